"""The NOTICE that goes with the data: whose fonts the images were rendered from, and under which terms.

Rendered images are no font software. The OFL exempts "any document created using the fonts"; the UmeFont and
Hanazono licenses permit everything; the author of the Aoyagi and Kouzan fonts declares them public domain;
MIT, BSD-3-Clause and Apache-2.0 want their notice and text to go along.
"""

from __future__ import annotations

from pathlib import Path

from fontTools.ttLib import TTFont

from .fetch import license_file
from .fonts import Font, Package, packages_of

_HEAD = """\
Kanji images rendered from the fonts listed below
==================================================

The .npz file beside this notice holds 32x32 images of JIS X 0208 kanji, drawn from the fonts below by
lab/build_dataset.py. It holds no font software: no outlines, no hinting, no tables. Font names
are used here only to say where the images come from; they may be reserved by their owners, who do not endorse
this data.

Each entry: font (package and version), license, then the copyright line of the package's own copyright or
LICENSE file, with the font's name table quoted after it where the file is vague.

"""
_TERMS = """
What the licenses ask
---------------------

OFL-1.1 (https://openfontlicense.org): "The requirement for fonts to remain under this license does not apply
to any document created using the fonts or their derivatives." The images are such a document.

UmeFont, Hanazono Font License: "Unlimited permission is granted to use, copy, and distribute it, with or
without modification, either commercially and noncommercially", provided "AS IS" without warranty.

Public domain: the author of the Aoyagi and Kouzan fonts states that all five are in the public domain
("青柳フォント５体、全てについてパブリックドメインと致しております、自由にお使い頂けたらと思います。").

Apache-2.0: the full text is the file LICENSE in the root of this repository. The images are a changed form of
what these packages hold.

The texts of the others follow, as their packages give them.
"""


def write_notice(path: Path, fonts: tuple[Font, ...], cache: Path) -> None:
    """Write the notice for `fonts`; the texts of MIT and BSD-3-Clause come from the unpacked packages."""
    parts = [_HEAD]
    for package in packages_of(fonts):
        names = ", ".join(_display_name(font) for font in fonts if font.package == package)
        parts.append(f"{names} ({package.name} {package.version})\n")
        parts.append(f"    {package.license}. Copyright: {package.copyright}\n")
    parts.append(_TERMS)
    for package in packages_of(fonts):
        if package.license in ("MIT", "BSD-3-Clause"):
            title = f"{package.name}: {package.license}"
            text = debian_license_text(license_file(package, cache), package.license)
            parts.append(f"\n{title}\n{'-' * len(title)}\n\nCopyright {package.copyright}\n\n{text}\n")
    path.write_text("".join(parts), encoding="utf-8")


def _display_name(font: Font) -> str:
    return Path(font.file).name if font.package.registry == "debian" else font.file.rstrip("-")


def debian_license_text(copyright_file: Path, license: str) -> str:
    """The text of the stand-alone `License: NAME` paragraph of a machine-readable Debian copyright file."""
    lines = copyright_file.read_text(encoding="utf-8").splitlines()
    starts = [
        i
        for i, line in enumerate(lines[:-1])
        if line.strip() == f"License: {license}" and lines[i + 1].startswith(" ")
    ]
    if not starts:
        raise ValueError(f"{copyright_file}: expected a text under 'License: {license}', got none")
    text = []
    for line in lines[starts[0] + 1 :]:
        if not line.startswith(" "):
            break
        text.append("" if line.strip() == "." else line[1:].rstrip())
    return "\n".join(text)


def states_copyright(package: Package, files: list[Path], cache: Path) -> bool:
    """Whether the fetched package (its copyright file or a name table) still says what fonts.py holds."""
    with TTFont(files[0], fontNumber=0, lazy=True) as font:
        stated = f"{license_file(package, cache).read_text(encoding='utf-8')} {font['name'].getDebugName(0)}"
    return package.copyright.split(";")[0] in " ".join(stated.split())
