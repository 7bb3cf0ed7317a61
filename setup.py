"""The package's build: compiles the kernels into the wheel where there is a C++ compiler.

Without one the wheel holds their sources only and fits every platform: they are compiled at first use, or torch serves
instead. `CXXFLAGS` are added to our own. The rest of the configuration is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_KERNELS = Path(__file__).parent / "worker" / "kernels"
# By path: importing the package would need what it depends on.
_spec = importlib.util.spec_from_file_location("kernels_build", _KERNELS / "build.py")
assert _spec is not None and _spec.loader is not None
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)


class KernelsBuild(build_py):
    """Adds the compiled library to the package."""

    def run(self) -> None:
        """Copy the modules, then compile. An editable install compiles at first use."""
        super().run()
        folder = Path(self.build_lib) / "worker" / "kernels"
        if self.editable_mode or _build.find_compiler() is None:
            return
        for stale in folder.glob("*.so"):
            if stale.name != _build.library_name():
                stale.unlink()
        if not (folder / _build.library_name()).is_file():
            _build.compile_into(folder, extra=shlex.split(os.environ.get("CXXFLAGS", "")))


class KernelsWheel(bdist_wheel):
    """A plain C interface: any Python of the platform can load it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tag of the wheel's file name."""
        python, interface, system = super().get_tag()
        return (python, interface, system) if self.root_is_pure else ("py3", "none", system)


class KernelsDistribution(Distribution):
    """Bound to a platform if the kernels are compiled."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel holds machine code."""
        return _build.find_compiler() is not None


setup(cmdclass={"build_py": KernelsBuild, "bdist_wheel": KernelsWheel}, distclass=KernelsDistribution)
