"""Pages link to existing files."""

import re

import pytest

from tests.method_helpers import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "web/docs").glob("*.md"), ROOT / "demo/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_docs_link_to_existing_files_and_modules(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert all((page.parent / link).exists() for link in links), links
    modules = re.findall(r"python -m ((?:evidence|benchmarks)[\w.]*)", text)
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules), modules
