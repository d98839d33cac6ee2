"""Fetch font packages from Debian and npm into a cache folder and unpack them there, without root."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from .fonts import Font, Package


class FetchError(RuntimeError):
    """A package could not be fetched or unpacked; the message says which, and what to try."""


def fetch(package: Package, cache: Path) -> Path:
    """The folder with the unpacked `package`; downloads it unless it is in the cache already."""
    folder = unpacked_folder(package, cache)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place and renamed, so that an interrupted run leaves no half a package behind.
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        download = _apt_download if package.registry == "debian" else _npm_download
        archive = download(package, Path(work))
        contents = Path(work) / "contents"
        contents.mkdir()
        unpack = _unpack_deb if package.registry == "debian" else _unpack_npm
        unpack(archive, contents)
        contents.rename(folder)
    return folder


def unpacked_folder(package: Package, cache: Path) -> Path:
    """Where `package` lies once fetched."""
    return cache / "packages" / package.name.replace("/", "-").lstrip("@")


def font_files(font: Font, cache: Path) -> list[Path]:
    """The file of `font`, or its woff2 subsets in the order of their names."""
    folder = unpacked_folder(font.package, cache)
    if font.package.registry == "debian":
        files = [folder / "usr/share/fonts" / font.file]
    else:
        files = sorted((folder / "package/files").glob(f"{font.file}*-400-normal.woff2"))
    if not files or not files[0].is_file():
        raise FetchError(
            f"font {font.key}: no file {font.file!r} in package {font.package.name} under {folder}"
        )
    return files


def license_file(package: Package, cache: Path) -> Path:
    """The copyright file of a Debian package, the LICENSE of an npm package."""
    folder = unpacked_folder(package, cache)
    if package.registry == "debian":
        return folder / "usr/share/doc" / package.name / "copyright"
    return folder / "package/LICENSE"


def _apt_download(package: Package, work: Path) -> Path:
    _run(["apt-get", "download", package.name], work, f"run `apt-get update` first? ({package.name})")
    return _only_file(work, "*.deb", package)


def _npm_download(package: Package, work: Path) -> Path:
    wanted = f"{package.name}@{package.version}"
    _run(["npm", "pack", "--silent", wanted], work, "is the registry reachable?")
    return _only_file(work, "*.tgz", package)


def _unpack_deb(archive: Path, contents: Path) -> None:
    _run(["dpkg-deb", "-x", str(archive), str(contents)], contents, "dpkg-deb comes with Debian's dpkg")


def _unpack_npm(archive: Path, contents: Path) -> None:
    """Only the regular weight and the license: the packages hold up to a dozen weights."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(("-400-normal.woff2", "/LICENSE", "/package.json")):
                tar.extract(member, contents, filter="data")


def _only_file(work: Path, pattern: str, package: Package) -> Path:
    found = list(work.glob(pattern))
    if len(found) != 1:
        raise FetchError(
            f"package {package.name}: expected one {pattern} after the download, got {len(found)}"
        )
    return found[0]


def _run(command: list[str], folder: Path, hint: str) -> None:
    program = command[0]
    if shutil.which(program) is None:
        raise FetchError(
            f"{program} is not installed. Building the data needs apt-get, dpkg-deb (Debian or Ubuntu) and "
            "npm; the shipped data set needs none of them."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"`{' '.join(command)}` failed ({hint})\n{done.stderr.strip()[-2000:]}")
