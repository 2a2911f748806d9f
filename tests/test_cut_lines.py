"""Lines that a benchmark cuts out of pages described in ALTO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.cut_lines import main

ALTO = """<alto xmlns="http://www.loc.gov/standards/alto/ns-v4#">
<Tags><OtherTag ID="a" LABEL="default"/><OtherTag ID="b" LABEL="InterlinearLine"/></Tags>
<Layout><Page WIDTH="400" HEIGHT="{height}"><PrintSpace><TextBlock>{lines}</TextBlock></PrintSpace>
</Page></Layout></alto>"""
LINE = '<TextLine TAGREFS="{kind}"><Shape><Polygon POINTS="{points}"/></Shape></TextLine>'


def test_lines_are_cut_out_along_their_polygons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "data" / "hand" / "f1.jpg"
    page.parent.mkdir(parents=True)
    count, height = 20, 20 * 60
    # The description is of a page twice as large.
    Image.fromarray(np.full((height // 2, 200), 180, np.uint8)).save(page, quality=95)
    lines = [
        (f"20 {60 * n} 380 {60 * n} 380 {60 * n + 30} 20 {60 * n + 50}", "a") for n in range(count)
    ]
    lines += [("20 -900 380 -900 380 -860 20 -850", "a")]  # not on this page
    lines += [("20 10 380 10 380 50 20 50", "b"), ("20 10 90 10 90 50 20 50", "a")]
    drawn = "".join(LINE.format(kind=kind, points=points) for points, kind in lines)
    page.with_suffix(".xml").write_text(ALTO.format(height=height, lines=drawn))
    alone = page.with_name("f2.xml")
    alone.write_text("<alto/>")
    assert main([str(tmp_path / "data"), "--output", str(tmp_path / "hands")]) == 0
    cut = sorted((tmp_path / "hands").rglob("*.png"))
    assert [path.relative_to(tmp_path / "hands").as_posix() for path in cut] == [
        f"hand/f1/line_{number:03d}.png" for number in range(1, 14)
    ]
    for path in cut:
        grey = np.asarray(Image.open(path).convert("L")).astype(int)
        assert grey.shape == (26, 181)
        assert np.abs(grey[:14] - 180).max() < 5
        assert grey[-1, -1] == 0
        assert 0.75 < (grey > 0).mean() < 0.85
    assert capsys.readouterr().out == (
        f"{alone}: left out, no image of its name\n13 lines in {tmp_path / 'hands'}\n"
    )
    twin = tmp_path / "data" / "other" / "hand"
    twin.mkdir(parents=True)
    for name in ("f1.jpg", "f1.xml"):
        (twin / name).write_bytes((page.parent / name).read_bytes())
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "data"), "--output", str(tmp_path / "again")])
    assert ended.value.code == 2
    assert "have the same name" in capsys.readouterr().err
