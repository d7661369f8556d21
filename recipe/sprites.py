"""Make `sprites.zip` from the four icon packages: `python -m recipe.sprites NODE_MODULES`.

Get them first:
    npm install @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6 \\
        @iconify-json/fluent-emoji-high-contrast@1.2.6 @iconify-json/noto@1.2.9
The archive is deterministic: same packages and resvg, same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import resvg_py
from PIL import Image

from recipe.world import ACTIONS, ARCHIVE, OBJECTS, STYLES

PIXELS = 112
LICENCES = {
    "fluent-emoji": "MIT, Copyright (c) Microsoft Corporation",
    "fluent-emoji-flat": "MIT, Copyright (c) Microsoft Corporation",
    "fluent-emoji-high-contrast": "MIT, Copyright (c) Microsoft Corporation",
    "noto": "Apache-2.0, Copyright Google LLC",
}


def render(package: dict, icon: str) -> bytes:
    """One icon as PNG bytes, `PIXELS` wide."""
    name, icons, aliases = icon, package["icons"], package.get("aliases", {})
    while name not in icons:
        name = aliases[name]["parent"]
    body = icons[name]["body"].replace("currentColor", "#111")
    width, height = package.get("width", 16), package.get("height", 16)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PIXELS, height=PIXELS))
    # 8-bit palette with alpha: a third of the bytes, no visible difference at 64 pixels
    out = io.BytesIO()
    quantized = Image.open(io.BytesIO(png)).convert("RGBA").quantize(255)
    quantized.save(out, "PNG", optimize=True)
    return out.getvalue()


def main(node_modules: Path) -> None:
    folder = node_modules / "@iconify-json"
    sprites, packages = {}, {}
    for package_name in STYLES.values():
        source = folder / package_name / "icons.json"
        package = json.loads(source.read_text())
        packages[package_name] = {
            "npm": f"@iconify-json/{package_name}",
            "version": json.loads((folder / package_name / "package.json").read_text())["version"],
            "icons.json sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "licence": LICENCES[package_name],
        }
        for icon in (*OBJECTS.values(), *ACTIONS.values()):
            sprites[f"{package_name}/{icon}"] = render(package, icon)
    manifest = {
        "made by": f"recipe/sprites.py, resvg_py {version('resvg_py')}",
        "pixels": PIXELS,
        "packages": packages,
        "sprites": {n: hashlib.sha256(png).hexdigest() for n, png in sprites.items()},
    }
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_STORED) as archive:
        entries = {"manifest.json": json.dumps(manifest, indent=1).encode()}
        entries |= {f"{n}.png": png for n, png in sprites.items()}
        for name, data in entries.items():
            info = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    digest = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
    print(
        f"{ARCHIVE.name}: {len(sprites)} sprites, {ARCHIVE.stat().st_size} bytes, sha256 {digest}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
