"""Runs the demo and every script of the gallery, one after the other: ``python -m examples``

``--pictures`` then copies what they drew into docs/pictures, for docs/gallery.md.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
DEMO = "digits_diffusion"
COLOURS = 64  # enough for curves and bars, and a small file
PICTURES = {f"gallery-{name}.png": Path(f"out/examples/{name}.png") for name in SCRIPTS} | {
    f"gallery-{DEMO}.png": Path("out/demo/loss.png"),
    f"gallery-{DEMO}-samples.png": Path("out/demo/samples.png"),
}


def main() -> int:
    """Runs all, prints the seconds of each, and returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", action="store_true", help="copy the pictures into docs/pictures")
    options = parser.parse_args()
    seconds, failed = {}, []
    for name in (DEMO, *SCRIPTS):
        print(f"\n== examples.{name}", flush=True)
        started = time.perf_counter()
        run = subprocess.run([sys.executable, "-m", f"examples.{name}"], env={**os.environ, "MPLBACKEND": "Agg"})
        seconds[name] = time.perf_counter() - started
        failed += [name] if run.returncode else []
    print("\nSeconds:")
    for name, each in seconds.items():
        print(f"{each:6.0f}  {name}{'  FAILED' if name in failed else ''}")
    if options.pictures and not failed:
        for picture, drawn in PICTURES.items():
            image = Image.open(drawn).convert("RGB").quantize(COLOURS)
            image.save(FOLDER.parent / "docs/pictures" / picture, optimize=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
