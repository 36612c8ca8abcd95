"""Names from data on the page of a report and on a model card."""

import html
import re
from pathlib import Path
from types import SimpleNamespace

from tests.trainer.harness import write_recipe
from trainer.export.card import write_card
from trainer.loading import load_config
from trainer.report.examples import ClassScore, Examples, Found, Query
from trainer.report.history import History
from trainer.report.page import render_page

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "]]></script><script>--><!--",
    r"$\frac{$ a $x_{$",
    "_hidden",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\u202e",
]


def test_a_report_shows_names_as_they_are():
    steps = [{"step": 1, "samples": 8, "loss": 1.0, "step_seconds": 1.0, "data_seconds": 0.1}]
    events = [{"event": "eval", "step": 1, "set": name, "acc1": 0.5} for name in HOSTILE]
    histories = [History(name, Path(), steps, events if name == HOSTILE[0] else []) for name in HOSTILE]
    picture = "data:image/png;base64,"
    examples = [
        (
            name,
            Examples(
                name,
                None,
                [Query(name, [Found(picture, 0.5, True)], 1)],
                [ClassScore(name, 0.5, 3, name, picture)],
                [],
            ),
        )
        for name in HOSTILE
    ]
    page = render_page(histories, examples, [(name, f"recipe: {name}") for name in HOSTILE])
    for wrong in ("<script>alert", "<script>--", "<img src=x", "\x1b", "\u202e"):
        assert wrong not in page
    drawn = html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)", page)))
    read = html.unescape(page)
    for name in HOSTILE:
        shown = name.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
        assert read.count(shown) > 10
        # The title of its curve, and the legends, which leave out labels that begin with an underscore.
        assert drawn.count(shown) == 1 + len(HOSTILE) + 2


def test_a_model_card_shows_names_as_they_are(tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", "/d/a|b`c``/0.tar", "clip", data={"mask_token": False})
    config = load_config(str(recipe), {"recipe": "'[x](http://y) | <b>_z_'"})
    (tmp_path / "metrics.jsonl").write_text('{"event": "eval", "step": 1, "set": "a|b\\n# <i>", "acc1": 0.5}\n')
    model = SimpleNamespace(
        parameters=list,
        embed_dim=8,
        image_tower=SimpleNamespace(image_size=32),
        pixel_mean=(0.5,),
        pixel_std=(0.5,),
        logit_scale=lambda: 1.0,
        logit_bias=None,
    )
    exported = SimpleNamespace(config=config, model=model, run=tmp_path, step=1, weights="trained")
    write_card(exported, "openclip", tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert r"# \[x\](http://y) \| &lt;b&gt;\_z\_" in card.splitlines()
    assert r"| Data | ``` /d/a\|b`c``/0.tar ``` |" in card.splitlines()
    assert r"| a\|b\\n# &lt;i&gt; | 50.00 |" in card.splitlines()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
