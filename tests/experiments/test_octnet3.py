"""The page of the networks is what their summaries say."""

import pytest

from experiments import octnet3
from experiments.frame import RESULTS


def test_the_page_is_up_to_date(tmp_path):
    text = octnet3.main(["--report", str(tmp_path)])
    assert (tmp_path / "octnet3.md").read_text() == text
    assert text == (RESULTS / "octnet3.md").read_text(), (
        "run python -m experiments.octnet3 --report"
    )
    assert text.count("\nlogits ") == 6


def test_a_report_is_of_all_networks(tmp_path, capsys):
    """Catches a page of one network in place of the page of six."""
    with pytest.raises(SystemExit):
        octnet3.main(["--resolutions", "64", "--report", str(tmp_path)])
    assert "--report writes the page of all networks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
