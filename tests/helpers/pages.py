"""A report page as a test reads it: its sections, tables, figures and rows."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Node:
    """An element with its attributes, children and text."""

    tag: str
    attributes: dict
    children: list = field(default_factory=list)

    @property
    def text(self):
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(parts).replace("\u00a0", " ").split())

    def all(self, tag, **attributes):
        """Return the elements below it of a tag, with these attributes."""
        below = []
        for child in self.children:
            if isinstance(child, Node):
                given = {name: child.attributes.get(name) for name in attributes}
                below += [child] * ((tag in ("*", child.tag)) and given == attributes)
                below += child.all(tag, **attributes)
        return below

    def one(self, tag, **attributes):
        (node,) = self.all(tag, **attributes)
        return node

    @property
    def table(self):
        """The rows of its only table, each a dict from the head to text, or to the number behind it."""
        return rows_of(self.one("table"))


def rows_of(table):
    head = [cell.text for cell in table.one("thead").all("th")]
    names = [f"{name} {head[:i].count(name)}" if head[:i].count(name) else name for i, name in enumerate(head)]
    rows = []
    for row in table.one("tbody").all("tr"):
        cells = [child for child in row.children if isinstance(child, Node)]
        numbers = [cell.all("data") for cell in cells]
        values = [float(n[0].attributes["value"]) if n else c.text for n, c in zip(numbers, cells, strict=True)]
        rows.append(dict(zip(names, values, strict=True)))
    return rows


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = Node("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes))
        if tag in ("dt", "dd") and self.open[-1].tag in ("dt", "dd"):
            self.open.pop()
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Node(tag, dict(attributes)))

    def handle_endtag(self, tag):
        while len(self.open) > 1:
            if self.open.pop().tag == tag:
                return

    def handle_data(self, text):
        self.open[-1].children.append(text)


def read_page(html):
    """Return the root of a page."""
    reader = _Reader()
    reader.feed(html)
    return reader.root


def figure(page, name):
    """Return the rows of numbers below a figure."""
    return page.one("figure", **{"data-figure": name}).table


def section(page, name):
    return page.one("section", id=name)
