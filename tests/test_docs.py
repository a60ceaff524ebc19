"""An undocumented hook, or an undocumented public name, cannot exist."""

import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import embsearch_plugin as es
from embsearch_plugin.algorithms.base import AlgorithmConfig, SearchConfig
from embsearch_plugin.hookspecs import GlobalHooks, SessionHooks
from embsearch_plugin.recipe_fields import _section, described_fields, markdown
from embsearch_plugin.search.probe import Probe
from embsearch_plugin.search.session import Session
from embsearch_plugin.study.config import Study

DOCS = Path(__file__).parents[1] / "docs"
HOOKS = {
    name: function
    for specs in (GlobalHooks, SessionHooks)
    for name, function in vars(specs).items()
    if name.startswith("embsearch_")
}


def documented() -> dict[str, str]:
    """Return the text below each hook's heading."""
    parts = re.split(r"^### `(.*)`$", (DOCS / "hooks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_hook_is_documented_with_its_arguments_and_no_other() -> None:
    signatures = [f"{name}({', '.join(list(inspect.signature(hook).parameters)[1:])})" for name, hook in HOOKS.items()]
    assert list(documented()) == signatures


@pytest.mark.parametrize("heading", documented())
def test_a_hook_says_when_with_what_and_for_whom(heading: str) -> None:
    name, text = heading.partition("(")[0], documented()[heading]
    signature = inspect.signature(HOOKS[name])
    assert all(f"**{item}:**" in text for item in ("When", "For"))
    assert all(f"`{argument}`" in text for argument in list(signature.parameters)[1:])
    assert ("**Returns:**" in text) == (signature.return_annotation != "None")
    assert ("First result." in text) == HOOKS[name].embsearch_spec["firstresult"]
    assert inspect.getdoc(HOOKS[name])


@pytest.mark.parametrize("name", es.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(es, name)
    doc = inspect.getdoc(value) or ""
    if inspect.isclass(value):  # neither inherited nor made up by @dataclass
        doc = value.__doc__ or ""
        assert not doc.startswith(f"{name}(")
    assert doc.strip()


OF_A_LOOP = {"attach", "detach", "step", "validated", "derive", "compact", "state_dict", "load_state_dict"}
OF_A_RUN = {
    "folds",
    "first_search_step",
    "least_weight_steps",
    "build",
    "look_up",
}  # what runs ask, made of what else is said there


@pytest.mark.parametrize("owner", [Session, Probe, AlgorithmConfig, SearchConfig])
def test_what_an_algorithm_may_use_and_say_is_in_the_guide(owner: type) -> None:
    guide = (DOCS / "extending.md").read_text(encoding="utf-8")
    public = {name for name in vars(owner) if not name.startswith("_")} - OF_A_LOOP - OF_A_RUN
    assert [name for name in sorted(public) if not re.search(rf"`[^`]*\b{name}\b[^`]*`", guide)] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_page_of_recipe_fields_is_what_the_code_says() -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert page == markdown()  # python -m embsearch_plugin.recipe_fields > docs/recipes.md


def test_a_field_that_no_docstring_describes_cannot_be_documented() -> None:
    assert set(described_fields(Study)) >= {field.name for field in fields(Study)}
    with pytest.raises(KeyError):
        _section("x", "", Undescribed)


@dataclass(frozen=True)
class Undescribed:
    """Args: none."""

    name: int = 0
