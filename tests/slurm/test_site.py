from pathlib import Path

import pytest
import yaml

from mopd_nemo.config import UserError
from mopd_nemo.slurm.site import EXAMPLE_FILE, SiteConfig, load_site

ROOT = Path(__file__).parents[2]


def test_example_names_every_key_and_loads() -> None:
    example = ROOT / EXAMPLE_FILE
    assert set(yaml.safe_load(example.read_text())) == set(SiteConfig.model_fields)
    assert load_site(example).account is not None


def test_site_file_is_not_in_git() -> None:
    assert "/slurm/site.yaml" in (ROOT / ".gitignore").read_text().splitlines()


def test_without_a_site_file_the_error_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOPD_SITE", raising=False)
    with pytest.raises(UserError, match=r"slurm/site.yaml: no such site file; copy slurm/site.example.yaml"):
        load_site(None)
    monkeypatch.setenv("MOPD_SITE", str(ROOT / EXAMPLE_FILE))
    assert load_site(None).root.startswith("/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount: x", r"unknown key acount; did you mean account\?"),
        ("environment: {WANDB_API_KEY: x}", "environment.WANDB_API_KEY looks like a secret"),
        ("mounts: [data]", "mounts: 'data': write an absolute path"),
        ("options: [-A x]", "write each as --name=value"),
        ("gpu_request: yes please", "gpu_request='yes please'"),
    ],
)
def test_errors_name_the_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_site(file)
