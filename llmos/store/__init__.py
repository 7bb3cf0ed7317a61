"""The model store: versions of models by content, on this machine, without torch."""

from llmos.store.default import DEFAULT_NAME, DEFAULT_SOURCE, ensure_default
from llmos.store.importer import import_model
from llmos.store.layout import default_store_path
from llmos.store.manifest import Manifest, ManifestFile
from llmos.store.progress import Progress
from llmos.store.store import Store

__all__ = [
    "DEFAULT_NAME",
    "DEFAULT_SOURCE",
    "Manifest",
    "ManifestFile",
    "Progress",
    "Store",
    "default_store_path",
    "ensure_default",
    "import_model",
]
