"""`make demo`: degrade a real photo, restore it through the whole system, and show the pictures.

Everything is real: Postgres, Redis and S3 from wheels, Ray Serve, ComfyUI and Real-ESRGAN.
The stack gets a state folder of its own, and is stopped again at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from serve_app.local.temporary import free_port
from tests.support.photos import degrade, enlarge, original, ssim

FOLDER = Path("demo")
PHOTO = "flower"
RESTORE = str(Path(sys.executable).with_name("restore"))

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    truth = original(PHOTO)
    before = degrade(truth)
    before.save(FOLDER / "before.png")
    console.print(
        f"[bold]1.[/] a photo, shrunk to {before.width}x{before.height}, noisy, JPEG at 60"
    )
    with tempfile.TemporaryDirectory(prefix="comfy-restore-demo-") as scratch:
        # its own data, engines and ports: a stack that is already up is left alone
        os.environ["COMFY_RESTORE_STATE"] = scratch
        restore_with_a_stack_of_its_own()
    after = Image.open(FOLDER / "after.png").convert("RGB")
    side_by_side(before, after).save(FOLDER / "side-by-side.png")
    report(truth, before, after)


def restore_with_a_stack_of_its_own() -> None:
    console.print("[bold]2.[/] the local stack starts: Postgres, Valkey, SeaweedFS, Ray, ComfyUI")
    started = time.monotonic()
    try:
        restore("up", "--detach", "--port", str(free_port()))
        console.print(f"   ready after {time.monotonic() - started:.0f} s")
        console.print("[bold]3.[/] the photo is restored through the HTTP API")
        restore("run", str(FOLDER / "before.png"), "-o", str(FOLDER / "after.png"))
        restore("jobs")
    finally:
        console.print("[bold]4.[/] the stack stops")
        restore("down")


def restore(*arguments: str) -> None:
    subprocess.run([RESTORE, *arguments], check=True)


def side_by_side(before: Image.Image, after: Image.Image) -> Image.Image:
    """Both at the size of the result; the damaged photo as a viewer would enlarge it."""
    height = after.height + 40
    picture = Image.new("RGB", (2 * after.width + 12, height), "white")
    picture.paste(enlarge(before, after.size), (0, 40))
    picture.paste(after, (after.width + 12, 40))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(24)
    draw.text((8, 6), "before", "black", font)
    draw.text((after.width + 20, 6), "after", "black", font)
    return picture


def report(truth: Image.Image, before: Image.Image, after: Image.Image) -> None:
    bicubic, restored = ssim(truth, enlarge(before, truth.size)), ssim(truth, after)
    console.print(
        f"\n[bold]{FOLDER / 'side-by-side.png'}[/] shows before and after. Likeness to the "
        f"undamaged photo (SSIM): enlarged {bicubic:.3f}, restored {restored:.3f}"
    )
    console.print("\nGo on with your own photos:")
    console.print(f"  {RESTORE} up                                    # leave it running")
    console.print(f"  {RESTORE} run photo.jpg -o restored.png         # in another terminal")


if __name__ == "__main__":
    main()
