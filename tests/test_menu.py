"""Menu categories, display names, tooltips and help pages of the nodes."""

from tests.method_helpers import ROOT

ROOMS = {"COVE/load", "COVE/match", "COVE/edit", "COVE/check"}


def test_nodes_are_in_the_menu_categories(nodes):
    schemas = [node.define_schema() for node in nodes.values()]
    assert {schema.category for schema in schemas} == ROOMS
    assert all(sum(schema.category == room for schema in schemas) <= 8 for room in ROOMS)


def test_nodes_have_unique_display_names_with_the_packs_prefix(nodes):
    names = [node.define_schema().display_name for node in nodes.values()]
    assert all(name.startswith("COVE ") for name in names) and len(set(names)) == len(names)


def test_nodes_describe_every_input(nodes):
    for name, node in nodes.items():
        schema = node.define_schema()
        assert schema.description, name
        assert all(slot.tooltip for slot in schema.inputs or []), name


def test_nodes_each_have_a_help_page(nodes):
    pages = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == {node.define_schema().node_id for node in nodes.values()}
