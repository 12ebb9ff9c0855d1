"""Fail unless the installed package, without its source tree and its extras, imports as a whole."""

import importlib
import pkgutil
import sys
from importlib.metadata import version
from pathlib import Path

import lightning_tpgm


def main() -> None:
    location = Path(lightning_tpgm.__file__).resolve()
    if not location.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"{location} is not the installed copy.")
    if version("lightning-tpgm") != lightning_tpgm.__version__:
        sys.exit(f"Metadata say {version('lightning-tpgm')}, the package says {lightning_tpgm.__version__}.")
    modules = [module.name for module in pkgutil.walk_packages(lightning_tpgm.__path__, "lightning_tpgm.")]
    for name in modules:
        importlib.import_module(name)
    for name in lightning_tpgm.__all__:
        getattr(lightning_tpgm, name)
    print(f"lightning_tpgm {lightning_tpgm.__version__}: {len(modules)} modules import")


if __name__ == "__main__":
    main()
