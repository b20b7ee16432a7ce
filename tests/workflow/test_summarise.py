"""Tables over several stored results."""

from pathlib import Path

from summarise import (
    RESULTS,
    summarise,
)


def test_the_stored_tables_are_those_of_the_stored_results(tmp_path: Path) -> None:
    for folder in RESULTS.iterdir():
        if folder.name != "summary":
            (tmp_path / folder.name).symlink_to(folder)
    stored = {path.name: path for path in (RESULTS / "summary").iterdir()}
    written = {path.name: path for path in summarise(tmp_path)}
    assert set(written) == set(stored)
    for name, path in written.items():
        if path.suffix == ".png":  # libraries draw letters in more than one way
            assert path.read_bytes().startswith(b"\x89PNG"), name
        else:
            assert path.read_text("utf-8") == stored[name].read_text("utf-8"), name
    assert written["explorer.html"].stat().st_size < 850_000


def test_what_is_not_stored_is_left_out(tmp_path: Path) -> None:
    for name in ("transfer", "atlas"):
        (tmp_path / name).symlink_to(RESULTS / name)
    written = {path.stem for path in summarise(tmp_path)}
    assert {"judged", "kept_up_to", "explorer"} <= written
    assert not {"factorial-efficientnet_lite0", "tuning-efficientnet_lite0", "weights"} & written
