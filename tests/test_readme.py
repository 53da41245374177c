"""What the README and the pages of docs/ say, against the code."""

import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script

import predict
from build import configure, load_rewards, schema_of
from config import keys_table, parse_override, read_yaml
from train import parse
from vit_model import VisionTransformer

PAGES = {
    str(path): path.read_text(encoding="utf-8") for path in (Path("README.md"), *sorted(Path("docs").glob("*.md")))
}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", ALL, re.S)).replace("\\\n", " ")
LINES = [shlex.split(line, comments=True) for line in BLOCKS.splitlines() + re.findall(r"`(uv run [^`…]+)`", ALL)]
COMMANDS = [line for line in LINES if line]  # of all pages, in blocks and in the text, as lists of words
TRAIN = [line[line.index("train.py") + 1 :] for line in COMMANDS if "train.py" in line and "--help" not in line]
VIT_S = {"model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6, "model.patch_size": 14}
PREDICT = [line[line.index("predict.py") + 1 :] for line in COMMANDS if "predict.py" in line]


def test_the_readme_is_one_page_and_leads_to_the_others():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1700
    assert all(f"({page})" in README for page in PAGES if page != "README.md")
    assert all(path.name in README for path in Path().glob("*.py"))
    assert not re.findall(r"@[A-Z]+@", ALL) and len(TRAIN) > 15 and len(PREDICT) > 5


def test_the_config_table_is_the_schema():
    assert keys_table(schema_of()) in PAGES["docs/config.md"]


def test_the_reward_shown_is_the_examples():
    example = load_script("examples/cheque_reward.py")
    source = "\n\n\n".join(inspect.getsource(f).strip() for f in (example.cheque_cost, example.cheque_reward))
    assert f"```python\n{source}\n```" in README


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_what_the_commands_run_is_there(argv):
    """The script and the extra packages; the flags, too, of a script whose parser no other test here asks."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert argv[:2] == ["uv", "run"] and (argv[2] != "--extra" or argv[3] in extras)
    script, *rest = argv[4:] if argv[2] == "--extra" else argv[2:]
    assert script in ("pytest", "python", "tensorboard", "torchrun") or Path(script).is_file()
    if script.startswith(("tools/", "data/")):
        assert all(f'"{flag}"' in Path(script).read_text() for flag in rest if flag.startswith("--"))


@pytest.mark.parametrize("argv", TRAIN, ids=" ".join)
def test_the_commands_that_train_are_valid(argv):
    """Flags, config files, keys and rewards exist, and the config that results passes the check; pretrained weights are
    those of a ViT-S."""
    args = parse(argv)
    keys = dict(map(parse_override, args.overrides))
    of_file = VIT_S if str(keys.get("model.checkpoint_path")).endswith(".pth") else {}
    _, task = configure((args.config, read_yaml(args.config)), ("weights", of_file), ("README", keys))
    assert load_rewards(task)


@pytest.mark.parametrize("argv", PREDICT, ids=" ".join)
def test_the_commands_that_predict_are_valid(argv, monkeypatch, tmp_path):
    """Flags exist, images, --evaluate, --fit or --export are given, and the run is one that another command leaves."""
    seen, runs = [], list(map(parse, TRAIN))
    for name in ("predict", "evaluate", "fit", "export"):
        monkeypatch.setattr(predict, name, lambda args: seen.append(args) or 0)
    monkeypatch.chdir(tmp_path)  # --out makes its folder
    assert predict.main(argv) == 0
    (args,) = seen
    assert [bool(args.images), bool(args.evaluate), bool(args.fit), bool(args.export)].count(True) == 1
    assert all((ROOT / image).exists() for image in args.images if not image.startswith("photos/"))  # the reader's own
    names = {dict(map(parse_override, run.overrides)).get("training.run_name", Path(run.config).stem) for run in runs}
    assert args.checkpoint in {f"ckpt/{name}" for name in names}


def test_the_sizes_are_those_of_the_models():
    """Each row is a model that can be built and has as many parameters as it says, at 224 x 224 with 1000 classes."""
    columns = r"^\| ViT-(\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+).* \| ([\d.]+) M \|$"
    rows = re.findall(columns, PAGES["docs/scaling.md"], re.M)
    assert [row[0] for row in rows] == ["Ti", "S", "B", "L"]
    for name, *sizes, millions in rows:
        embed_dim, depth, num_heads, patch_size = map(int, sizes)
        with torch.device("meta"):
            model = VisionTransformer(224, patch_size, 3, embed_dim, depth, num_heads, num_classes=1000)
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions, name


def test_the_results_in_the_readme_are_those_of_docs():
    """The digits' accuracies are those of the table there, rounded."""
    table = re.search(r"<!-- results -->\n(.*)\n<!-- /results -->", PAGES["docs/results.md"], re.S).group(1)
    rows = re.findall(r"\| (\w+) \| [\d.]+ \| ([\d.]+)", table)
    accuracies = {name: f"{float(accuracy):.3f}" for name, accuracy in rows}
    text = README.partition("On the bundled digits")[2].partition("[All results]")[0].replace("\n", " ")
    assert f"`maxrl` has an eval accuracy of {accuracies['maxrl']} and the label {accuracies['supervised']}" in text
    assert all(f"`{name}` {accuracies[name]}" in text for name in ("grpo", "rloo"))


def anchors(page: str) -> set[str]:
    """Those that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.*)$", Path(page).read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Linked files and headings exist, and so do the files that a page calls by name."""
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        path = Path(page).parent / path if path else Path(page)
        assert path.exists() and (not anchor or anchor in anchors(path)), target
    for name in re.findall(r"`((?!path/|my_)[\w/]+\.(?:py|yaml))`", PAGES[page]):
        assert Path(name).exists(), name
