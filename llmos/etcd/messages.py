"""etcd's message classes, rebuilt from the descriptors inside the installed `etcd3` package.

`import etcd3` fails with protobuf >= 4: its modules were generated long ago. The serialized descriptors in them are
still sound, so this module reads them from the source text (nothing of it is executed), puts them into a private
descriptor pool and makes current classes of them, once per process and on first use:

    from llmos.etcd import messages as pb
    pb.PutRequest(key=b"k", value=b"v")

What etcd's API gained since those descriptors were generated, and we use, is added to them in `_modernise`.
The classes are typed `Any`: this module is the one edge where static types end.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import DecodeError

from llmos.errors import ConfigError

_MODULES = ("kv_pb2.py", "auth_pb2.py", "rpc_pb2.py")
_PACKAGES = ("mvccpb", "authpb", "etcdserverpb")


def __getattr__(name: str) -> Any:
    """A message class by its short name, e.g. `PutRequest`. Raises ConfigError if etcd3 is missing or unreadable."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return _classes()[name]
    except KeyError:
        raise AttributeError(f"etcd has no message {name!r}") from None


@functools.cache
def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    files = [_modernise(file) for file in _read_descriptors(_folder())]
    names = {file.name for file in files}
    for file in files:
        _drop_missing_dependencies(file, names)
        pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{message.name}"))
        for file in files
        for message in file.message_type
    }


def _folder() -> Path:
    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("The package etcd3 is not installed: pip install 'etcd3>=0.12'")
    return Path(spec.submodule_search_locations[0]) / "etcdrpc"


def _read_descriptors(folder: Path) -> Iterator[FileDescriptorProto]:
    """Yield the file descriptors in the order in which they depend on each other."""
    for module, package in zip(_MODULES, _PACKAGES, strict=True):
        try:
            file = FileDescriptorProto.FromString(serialized_descriptor((folder / module).read_text()))
        except (OSError, DecodeError, ValueError) as error:
            raise ConfigError(f"The package etcd3 has no readable {module}: reinstall 'etcd3>=0.12'") from error
        if file.package != package:
            raise ConfigError(f"The package etcd3 has an unknown {module}: reinstall 'etcd3>=0.12'")
        yield file


def serialized_descriptor(source: str) -> bytes:
    """Return the bytes of the file descriptor that the generated module `source` registers, without executing it.

    Knows both forms that protoc has written: `FileDescriptor(serialized_pb=_b('...'))` and `AddSerializedFile(b'...')`.
    Raises ValueError if there is neither.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            return _literal_bytes(node.value)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "AddSerializedFile"
        ):
            return _literal_bytes(node.args[0])
    raise ValueError("no serialized descriptor in this module")


def _literal_bytes(node: ast.expr) -> bytes:
    if isinstance(node, ast.Call) and len(node.args) == 1:  # _b('...'), the bytes written as a latin-1 string
        node = node.args[0]
    literal = ast.literal_eval(node)
    if isinstance(literal, str):
        return literal.encode("latin-1")
    if isinstance(literal, bytes):
        return literal
    raise ValueError("the descriptor is not a literal")


def _drop_missing_dependencies(file: FileDescriptorProto, present: set[str]) -> None:
    """Forget imports that only carried options (gogoproto, google.api): no message refers to their types."""
    kept = [name for name in file.dependency if name in present]
    del file.dependency[:]
    file.dependency.extend(kept)


def _modernise(file: FileDescriptorProto) -> FileDescriptorProto:
    """Add the progress request (etcd 3.4, field 3 of WatchRequest), if the package is older than it."""
    messages = {message.name: message for message in file.message_type}
    request = messages.get("WatchRequest")
    if request is None or "WatchProgressRequest" in messages:
        return file
    file.message_type.append(DescriptorProto(name="WatchProgressRequest"))
    request.field.append(
        FieldDescriptorProto(
            name="progress_request",
            number=3,
            label=FieldDescriptorProto.LABEL_OPTIONAL,
            type=FieldDescriptorProto.TYPE_MESSAGE,
            type_name=f".{file.package}.WatchProgressRequest",
            oneof_index=0,
        )
    )
    return file
