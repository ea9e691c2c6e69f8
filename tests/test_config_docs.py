from pathlib import Path

from docs.configuration import render


def test_configuration_page_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "configuration.md"
    assert page.read_text() == render(), "run `make docs`"
