"""What the README has beside its programs (test_pages.py): links, commands, and the table's cells of PyTorch."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.autograd import forward_ad

from fused_ops import __main__ as command_line

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = [*re.findall(r"\]\(([^)\s]+)\)", TEXT), *re.findall(r"^\[\w+\]: (\S+)$", TEXT, re.MULTILINE)]
COMMANDS = [
    line.partition("#")[0].split()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    if not language
    for line in block.splitlines()
]


def anchors(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", sorted({link for link in LINKS if "://" not in link}))
def test_a_link_leads_somewhere(link):
    name, _, anchor = link.partition("#")
    assert (ROOT / name).is_file()
    assert not anchor or anchor in anchors(ROOT / name)


def test_every_link_of_the_table_is_defined():
    used = set(re.findall(r"\]\[(\w+)\]", TEXT))
    assert used == set(re.findall(r"^\[(\w+)\]: ", TEXT, re.MULTILINE)) and used


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_is_one(command):
    """Installing is test_packaging's; the others are asked whether they know what they are given."""
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif command[:3] == ["python", "-m", "fused_ops"]:
        with pytest.raises(SystemExit) as stopped:
            command_line.main([*command[3:], "--help"])
        assert stopped.value.code == 0
    else:
        assert command[:2] == ["pip", "install"]


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="what is said is said of torch 2.13")
def test_of_torch_compile():
    """With Inductor double backward raises, forward-mode AD loses the tangent without a word, and vmap works."""
    compiled = torch.compile(lambda x, target: F.cross_entropy(x, target))
    x, target = torch.randn(8, 9, dtype=torch.float64, requires_grad=True), torch.randint(0, 9, (8,))
    (grad,) = torch.autograd.grad(compiled(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(grad.square().sum(), x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert forward_ad.unpack_dual(F.cross_entropy(dual, target)).tangent is not None
        assert forward_ad.unpack_dual(compiled(dual, target)).tangent is None
    batch = torch.randn(3, 8, 9), torch.randint(0, 9, (3, 8))
    expected = torch.stack([F.cross_entropy(*both) for both in zip(*batch, strict=True)])
    torch.testing.assert_close(torch.func.vmap(compiled)(*batch), expected)
