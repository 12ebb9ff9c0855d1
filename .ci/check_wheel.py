"""Fail unless the one wheel in a folder is small and holds the package, its py.typed, its licence, and nothing else."""

import sys
from pathlib import Path
from zipfile import ZipFile

PACKAGE = "lightning_tpgm"
LARGEST = 200_000  # bytes


def main(folder: str) -> None:
    wheels = sorted(Path(folder).glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"Expected one wheel in {folder}, found {[wheel.name for wheel in wheels]}.")
    size = wheels[0].stat().st_size
    if size > LARGEST:
        sys.exit(f"{wheels[0].name} should have at most {LARGEST:,} bytes, found {size:,}.")
    names = {name for name in ZipFile(wheels[0]).namelist() if not name.endswith("/")}
    info = "-".join(wheels[0].name.split("-")[:2]) + ".dist-info"

    source = {path.as_posix() for path in Path(PACKAGE).rglob("*.py")}
    expected = source | {f"{PACKAGE}/py.typed", f"{info}/licenses/LICENSE"}
    metadata = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")}
    if missing := expected - names:
        sys.exit(f"{wheels[0].name} lacks {sorted(missing)}.")
    if extra := names - expected - metadata:
        sys.exit(f"{wheels[0].name} should not hold {sorted(extra)}.")
    print(f"{wheels[0].name}: {len(names)} files, {size:,} bytes, as expected")


if __name__ == "__main__":
    main(sys.argv[1])
