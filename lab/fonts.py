"""The catalog of the data set: fonts with their packages and licenses, kanji, and the splits of both.

Fonts are split as strictly as characters are: a test font has no sibling (another weight, a parent, a copy
under another name) among the training fonts. Left out because of their terms: GPL and CC-BY-SA fonts, those
under the IPA license and Arphic's. `copyright` is what the package's own copyright or LICENSE file says, with
the font's name table quoted after it where that is vague.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OFL = "OFL-1.1"
APACHE = "Apache-2.0"
PUBLIC_DOMAIN = "public domain"


@dataclass(frozen=True)
class Package:
    """Names a package of Debian 12 (`registry="debian"`) or npm, with the version that the data came from."""

    registry: str
    name: str
    version: str
    license: str
    copyright: str


@dataclass(frozen=True)
class Font:
    """Names a font; `file` is relative to usr/share/fonts (Debian), or a prefix of woff2 subsets (npm)."""

    key: str
    package: Package
    file: str
    style: str


def _debian(name: str, version: str, license: str, copyright: str) -> Package:
    return Package("debian", f"fonts-{name}", version, license, copyright)


def _fontsource(key: str, name: str, version: str, style: str, license: str, copyright: str) -> Font:
    package = Package("npm", f"@fontsource/{name}", version, license, copyright)
    return Font(key, package, f"{name}-", style)


_NOTO = _debian(
    "noto-cjk",
    "1:20220127+repack1-1",
    OFL,
    "2010-2012, Google Corporation; © 2014-2021 Adobe (Sans), © 2017-2022 Adobe (Serif)",
)
_BIZ_GOTHIC = _debian("morisawa-bizud-gothic", "1.05-2", OFL, "2022 The BIZ UDGothic Project Authors")
_BIZ_MINCHO = _debian("morisawa-bizud-mincho", "1.05-2", OFL, "2022 The BIZ UDMincho Project Authors")
_CEDAR = _debian("motoya-l-cedar", "1.01-5", APACHE, "2010-2012, Motoya, Co.LTD,.")
_MPLUS = _debian("mplus", "063+git20221017+ds-1", OFL, "2002-2022 The M+ FONTS Project Authors")
_UME = _debian("horai-umefont", "670-5", "UmeFont", "2004-2017, Wataru Hourai; 2008, 2009 GlyphWiki Project")
_KONATU = _debian("konatu", "20121218-11", "MIT", "2007-2012 Mitiya Masuda <mitimasu@gmail.com>")
_HANAZONO = _debian(
    "hanazono", "20170904-2.1", "Hanazono or OFL-1.1", "2008, 2009, 2010, 2011 GlyphWiki Project."
)
_LXGW = _debian(
    "lxgw-wenkai",
    "1.250+repack-1",
    OFL,
    "2021-2022 lxgw <calxgw2018@gmail.com>; Copyright 2020 The Klee Project Authors",
)
_SETO = _debian("seto", "6.20-8", OFL, "2003-2014 瀬戸のぞみ (Nozomi Seto)")
_YOZ = _debian("yozvox-yozfont-edu", "14.04-2", OFL, "2004-2017, Y.Oz (Y.OzVox)")
_RAMPART = _debian("rampart", "1.000-20210120-2", OFL, "2020 The Rampart Project Authors")
_REGGAE = _debian("reggae", "1.000-20210120-2", OFL, "2020 The Reggae Project Authors")
_STICK = _debian("stick", "1.000-20210120-2", OFL, "2020 The Stick Project Authors")
_SOSEKI = _debian(
    "aoyagi-soseki", "20070207-17", PUBLIC_DOMAIN, "青柳衡山 (Kouzan Aoyagi); 青柳疎石 (Soseki Aoyagi)"
)
_MOUHITSU = _debian("kouzan-mouhitsu", "20170411-3", PUBLIC_DOMAIN, "青柳衡山 (Kouzan Aoyagi)")
_YUSEI = _debian("yusei-magic", "1.000-20210130-2", OFL, "2020 The Yusei Magic Project Authors")
_AOYAGI_T = _debian("aoyagi-kouzan-t", "20160404-6", PUBLIC_DOMAIN, "青柳衡山 (Kouzan Aoyagi)")
_KILOJI = _debian("kiloji", "1:2.1.0-25", "BSD-3-Clause", "2007 きろのの <kilo.sw@gmail.com>")
_DEJIMA = _debian("dejima-mincho", "227-16", "MIT", "2007-2010, Yoshiki Hayashi")
_DOTGOTHIC = _debian("dotgothic16", "1.000-20210120-2", OFL, "2020 The DotGothic16 Project Authors")
_KLEE = _debian("klee", "1.000-20210121-2", OFL, "2020 The Klee Project Authors")
_ROCKNROLL = _debian("rocknroll", "1.000-20210120-2", OFL, "2020 The RocknRoll Project Authors")
_TRAIN = _debian("train", "1.000-20210120-2", OFL, "2020 The Train Project Authors")
# Sawarabi Mincho is offered under CC-BY-SA-3.0 or OFL-1.1: used here under the OFL.
_SAWARABI = _debian("sawarabi-mincho", "20220815-1", OFL, "2008-2019, mshio <mshio@users.osdn.me>")
_DROID = _debian("droid-fallback", "1:6.0.1r16-1.1", APACHE, "© 2006, 2007, 2008, 2009, 2010 Google Corp.")

TRAIN_FONTS = (
    Font("notosans", _NOTO, "opentype/noto/NotoSansCJK-Regular.ttc", "gothic"),
    Font("notoserifB", _NOTO, "opentype/noto/NotoSerifCJK-Bold.ttc", "bold mincho"),
    Font("bizudg", _BIZ_GOTHIC, "truetype/bizud-gothic/BIZUDGothic-Regular.ttf", "gothic"),
    Font("bizudm", _BIZ_MINCHO, "truetype/bizud-mincho/BIZUDMincho-Regular.ttf", "mincho"),
    Font("cedar", _CEDAR, "truetype/motoya-l-cedar/MTLc3m.ttf", "gothic"),
    Font("mplus1Black", _MPLUS, "opentype/mplus/Mplus1-Black.otf", "heavy gothic"),
    Font("umetgo", _UME, "truetype/horai-umefont/ume-tgo4.ttf", "gothic"),
    Font("konatu", _KONATU, "truetype/konatu/Konatu.ttf", "rounded, for screens"),
    _fontsource(
        "zenmaru", "zen-maru-gothic", "5.3.0", "rounded gothic", OFL, "2021 The Zen Maru Gothic Authors"
    ),
    _fontsource(
        "zenkure", "zen-kurenaido", "5.3.0", "thin pen", OFL, "2021 The Zen Kurenaido Project Authors"
    ),
    _fontsource(
        "shippori", "shippori-mincho", "5.3.0", "old mincho", OFL, "2021 The Shippori Mincho Project Authors"
    ),
    _fontsource("kaisei", "kaisei-opti", "5.2.8", "display serif", OFL, "2020 The Kaisei Project Authors"),
    Font("hana", _HANAZONO, "truetype/hanazono/HanaMinA.ttf", "composed mincho"),
    Font("lxgw", _LXGW, "truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf", "kai, pen"),
    Font("seto", _SETO, "truetype/seto/setofont.ttf", "handwritten"),
    Font("yoz", _YOZ, "truetype/yozvox-yozfont/YOzRE_.ttf", "pen"),
    Font("rampart", _RAMPART, "truetype/rampart/RampartOne-Regular.ttf", "3-D outline"),
    Font("reggae", _REGGAE, "truetype/reggae/ReggaeOne-Regular.ttf", "heavy display"),
    Font("stick", _STICK, "truetype/stick/Stick-Regular.ttf", "straight strokes"),
    Font("soseki", _SOSEKI, "truetype/aoyagi-soseki/aoyagi-soseki.ttf", "running brush"),
)
VALIDATION_FONTS = (
    Font("kouzangyo", _MOUHITSU, "truetype/kouzan-mouhitsu/kouzan-mouhitsu-gyosho.ttf", "running brush"),
    Font("yusei", _YUSEI, "truetype/yusei-magic/YuseiMagic-Regular.ttf", "marker pen"),
    _fontsource(
        "zenold", "zen-old-mincho", "5.3.0", "mincho", OFL, "2021 The Zen Old Mincho Project Authors"
    ),
    _fontsource("lineseed", "line-seed-jp", "5.3.1", "gothic", OFL, "Google Inc.; © LY Corporation"),
)
TEST_FONTS = (
    Font("kouzan", _MOUHITSU, "truetype/kouzan-mouhitsu/kouzan-mouhitsu.ttf", "brush"),
    Font("aoyagit", _AOYAGI_T, "truetype/aoyagi-kouzan-t/AoyagiKouzanT.ttf", "brush"),
    Font("kiloji", _KILOJI, "truetype/kiloji/kiloji.ttf", "handwritten"),
    _fontsource("yomogi", "yomogi", "5.3.0", "thin handwritten", OFL, "2020 The Yomogi Project Authors"),
    _fontsource(
        "dela", "dela-gothic-one", "5.3.0", "very heavy", OFL, "2020 The Dela Gothic Project Authors"
    ),
    _fontsource("plex", "ibm-plex-sans-jp", "5.3.0", "gothic", OFL, "2018 IBM Corp. All rights reserved."),
    Font("dejima", _DEJIMA, "truetype/dejima-mincho/dejima-mincho-r227.ttf", "antique mincho"),
    Font("dotg", _DOTGOTHIC, "truetype/dotgothic16/DotGothic16-Regular.ttf", "16-pixel"),
)
# The larger set trains on these as well; its validation and test fonts are the same.
FULL_EXTRA_FONTS = (
    Font("notosansB", _NOTO, "opentype/noto/NotoSansCJK-Bold.ttc", "bold gothic"),
    Font("notoserif", _NOTO, "opentype/noto/NotoSerifCJK-Regular.ttc", "mincho"),
    Font("mplus1", _MPLUS, "opentype/mplus/Mplus1-Regular.otf", "gothic"),
    Font("mplus1Thin", _MPLUS, "opentype/mplus/Mplus1-Thin.otf", "thin gothic"),
    Font("umetmo", _UME, "truetype/horai-umefont/ume-tmo3.ttf", "mincho"),
    Font("klee", _KLEE, "truetype/klee/KleeOne-Regular.ttf", "pen"),
    Font("rocknroll", _ROCKNROLL, "truetype/rocknroll/RocknRollOne-Regular.ttf", "display"),
    Font("train", _TRAIN, "truetype/train/TrainOne-Regular.ttf", "rails"),
    Font("sawarabi", _SAWARABI, "truetype/sawarabi-mincho/sawarabi-mincho-medium.ttf", "mincho"),
    Font("droid", _DROID, "truetype/droid/DroidSansFallbackFull.ttf", "gothic"),
    _fontsource(
        "kosugimaru", "kosugi-maru", "5.3.0", "rounded gothic", APACHE, "2010 The Kosugi Maru Project Authors"
    ),
    _fontsource("zenkaku", "zen-kaku-gothic-new", "5.3.0", "gothic", OFL, "2022 The Zen Project Authors"),
    _fontsource("mochiy", "mochiy-pop-one", "5.3.0", "heavy pop", OFL, "2020 The MochiyPop Project Authors"),
    _fontsource("kiwi", "kiwi-maru", "5.3.0", "rounded serif", OFL, "2020 The Kiwi Maru Project Authors"),
)
COMPACT_FONTS = TRAIN_FONTS + VALIDATION_FONTS + TEST_FONTS
FULL_FONTS = COMPACT_FONTS + FULL_EXTRA_FONTS


def packages_of(fonts: tuple[Font, ...]) -> list[Package]:
    """Return the packages that hold `fonts`, each once, in the order of the fonts."""
    return list(dict.fromkeys(font.package for font in fonts))


# The kanji: JIS X 0208 in its own order, split by a fixed seed.

SPLIT_SEED = 20240607
TEST_CHARACTERS, VALIDATION_CHARACTERS, TRAIN_CHARACTERS = 500, 250, 2200

# Level-1 kanji that at least one of FULL_FONTS lacks or draws as a blank. Fixed here so that the compact set,
# which needs only 32 of the fonts, is split exactly as the full one; building the full one checks the list.
LEFT_OUT = "盈牙竃姦徽甑綻瀦穆聯"

_LEVEL_ROWS = {1: range(16, 48), 2: range(48, 85)}


def jis_kanji(level: int) -> str:
    """Return the kanji of JIS X 0208 `level` (1: 2,965 common ones; 2: 3,390 rarer ones) in its order."""
    kanji = []
    for row in _LEVEL_ROWS[level]:
        for cell in range(1, 95):
            try:
                kanji.append(bytes((0xA0 + row, 0xA0 + cell)).decode("euc_jp"))
            except UnicodeDecodeError:  # the last row of each level is not full
                continue
    return "".join(kanji)


def split_characters() -> tuple[str, str, str]:
    """Return 2,200 training, 250 validation and 500 test characters of level 1, drawn with a fixed seed."""
    pool = [c for c in jis_kanji(1) if c not in LEFT_OUT]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pool))
    shuffled = "".join(pool[i] for i in order)
    first, second = TEST_CHARACTERS, TEST_CHARACTERS + VALIDATION_CHARACTERS
    return shuffled[second : second + TRAIN_CHARACTERS], shuffled[first:second], shuffled[:first]
