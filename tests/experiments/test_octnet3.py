"""The page of the networks is what their summaries say."""

from experiments import octnet3
from experiments.frame import RESULTS


def test_the_page_is_up_to_date(tmp_path):
    text = octnet3.main(["--report", str(tmp_path)])
    assert (tmp_path / "octnet3.md").read_text() == text
    assert text == (RESULTS / "octnet3.md").read_text(), (
        "run python -m experiments.octnet3 --report"
    )
    assert text.count("\nlogits ") == 6
