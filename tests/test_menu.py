"""How the nodes are found in the menu and in search."""

from tests.method_helpers import ROOT

ROOMS = {"COVE/load", "COVE/match", "COVE/edit", "COVE/check"}


def test_every_node_is_in_a_room_of_the_menu(nodes):
    schemas = [node.define_schema() for node in nodes.values()]
    assert {schema.category for schema in schemas} == ROOMS
    assert all(sum(schema.category == room for schema in schemas) <= 8 for room in ROOMS)


def test_names_are_found_by_the_name_of_the_pack_and_are_unique(nodes):
    names = [node.define_schema().display_name for node in nodes.values()]
    assert all(name.startswith("COVE ") for name in names) and len(set(names)) == len(names)


def test_every_input_has_a_tooltip(nodes):
    for name, node in nodes.items():
        schema = node.define_schema()
        assert schema.description, name
        assert all(slot.tooltip for slot in schema.inputs or []), name


def test_every_node_has_a_help_page(nodes):
    pages = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == {node.define_schema().node_id for node in nodes.values()}
