"""The walk-through as a notebook: the lines of ``by_hand.py`` with their mathematics, run and compared one by one.

python -m fused_ops.examples.backprop_by_hand.notebook backprop_by_hand.ipynb     writes it, executed
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import by_hand, network, training

# The rule behind each gradient, as one reads it: dx is the gradient of the loss with respect to x.
FORMULAS = {
    "logprobs": r"\mathrm{loss} = -\frac1n \sum_i \mathrm{logprobs}_{i,y_i} \;\Rightarrow\; "
    r"d\,\mathrm{logprobs}_{ij} = -\tfrac1n [j = y_i]",
    "probs": r"\mathrm{logprobs} = \log \mathrm{probs} \;\Rightarrow\; "
    r"d\,\mathrm{probs} = d\,\mathrm{logprobs} / \mathrm{probs}",
    "counts_sum_inv": r"\mathrm{probs}_{ij} = \mathrm{counts}_{ij}\, s_i^{-1} \;\Rightarrow\; "
    r"d\,s_i^{-1} = \sum_j d\,\mathrm{probs}_{ij}\, \mathrm{counts}_{ij}",
    "counts_sum": r"d\,s = -d(s^{-1}) / s^2",
    "counts": r"d\,\mathrm{counts}_{ij} = d\,\mathrm{probs}_{ij}\, s_i^{-1} + d\,s_i",
    "norm_logits": r"\mathrm{counts} = e^{\mathrm{norm}} \;\Rightarrow\; "
    r"d\,\mathrm{norm} = d\,\mathrm{counts} \cdot \mathrm{counts}",
    "logit_maxes": r"\mathrm{norm}_{ij} = \mathrm{logits}_{ij} - m_i \;\Rightarrow\; "
    r"d\,m_i = -\sum_j d\,\mathrm{norm}_{ij} \approx 0",
    "logits": r"d\,\mathrm{logits}_{ij} = d\,\mathrm{norm}_{ij} + [j = \arg\max_k \mathrm{logits}_{ik}]\, d\,m_i",
    "h": r"\mathrm{logits} = h W_2 + b_2 \;\Rightarrow\; d\,h = d\,\mathrm{logits}\, W_2^{\top}",
    "W2": r"d\,W_2 = h^{\top} d\,\mathrm{logits}",
    "b2": r"d\,b_2 = \sum_i d\,\mathrm{logits}_i",
    "hpreact": r"h = \tanh a \;\Rightarrow\; d\,a = (1 - h^2)\, d\,h",
    "bngain": r"a = \gamma\, \hat x + \beta \;\Rightarrow\; d\,\gamma = \sum_i d\,a_i\, \hat x_i",
    "bnbias": r"d\,\beta = \sum_i d\,a_i",
    "bnraw": r"d\,\hat x = \gamma\, d\,a",
    "bnvar_inv": r"\hat x_i = (x_i - \mu)\, \sigma^{-1} \;\Rightarrow\; "
    r"d\,\sigma^{-1} = \sum_i d\,\hat x_i\, (x_i - \mu)",
    "bnvar": r"\sigma^{-1} = (v + \varepsilon)^{-1/2} \;\Rightarrow\; "
    r"d\,v = -\tfrac12 (v + \varepsilon)^{-3/2}\, d\,\sigma^{-1}",
    "bndiff2": r"v = \frac{1}{n-1} \sum_i \delta_i^2 \;\Rightarrow\; d\,(\delta_i^2) = \frac{1}{n-1}\, d\,v",
    "bndiff": r"d\,\delta_i = d\,\hat x_i\, \sigma^{-1} + 2\, \delta_i\, d\,(\delta_i^2)",
    "bnmeani": r"\delta_i = x_i - \mu \;\Rightarrow\; d\,\mu = -\sum_i d\,\delta_i",
    "hprebn": r"d\,x_i = d\,\delta_i + \tfrac1n\, d\,\mu",
    "embcat": r"x = e\, W_1 + b_1 \;\Rightarrow\; d\,e = d\,x\, W_1^{\top}",
    "W1": r"d\,W_1 = e^{\top} d\,x",
    "b1": r"d\,b_1 = \sum_i d\,x_i \approx 0",
    "emb": r"d\,\mathrm{emb} = d\,e \text{, in its own shape}",
    "C": r"d\,C_k = \sum_{(i,t):\, x_{it} = k} d\,\mathrm{emb}_{it}",
}

INSTALL = """
try:
    import fused_ops
except ImportError:  # a fresh machine, as Colab or Binder give one
    from pathlib import Path
    # beside a checkout, what is in it; else the released package
    source = "..[demo]" if Path("../setup.py").exists() else "fused_ops[demo]"
    %pip install -q {source}
    import fused_ops
"""

IMPORTS = """
%matplotlib inline
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

from fused_ops.examples.backprop_by_hand import data as names_data
from fused_ops.examples.backprop_by_hand.by_hand import tanh_one_rounding as tanh_backward
from fused_ops.examples.backprop_by_hand.gradients import autograd_gradients, fused_pairs
from fused_ops.examples.backprop_by_hand.network import BATCH, EPS, Parameters
from fused_ops.testing import compare_gradients

torch.set_num_threads(1)  # the network is tiny: a second thread only waits
"""

DATA = """
names = names_data.us_first_names()
data = names_data.build(names)
print(len(names), "names, such as", ", ".join(names[:6]))
print("characters:", data.vocabulary.characters)
print("contexts", tuple(data.train.contexts.shape), "and the character that follows", tuple(data.train.targets.shape))
"""

DRAW = """
p, generator = Parameters.draw(len(data.vocabulary))
ix = torch.randint(0, len(data.train), (BATCH,), generator=generator)
x, y = data.train.contexts[ix], data.train.targets[ix]
print(p.count(), "parameters; a minibatch of", len(x))
"""

AUTOGRAD = """
v, autograd = autograd_gradients(p, x, y)
seen = {}

def check(*names):
    \"\"\"Keeps what was found for these, and compares it with autograd's.\"\"\"
    seen.update({name: (d[name], autograd[name]) for name in names})
    for name in names:
        difference = (d[name] - autograd[name]).abs().max().item()
        print(f"d {name:<15} {'exact' if difference == 0 else f'within {difference:.0e}'}")
"""

PICTURE = """
d_logits = cross_entropy_backward(v["logits"], y) * len(y)
plt.figure(figsize=(8, 7))
plt.imshow(d_logits, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
plt.xticks(range(len(data.vocabulary)), list(data.vocabulary.characters))
plt.xlabel("class"); plt.ylabel("example"); plt.title("n times the gradient of the logits: what is right is pulled up")
plt.colorbar();
"""

TRAIN = """
from fused_ops.examples.backprop_by_hand.training import calibrate, train

p, generator = Parameters.draw(len(data.vocabulary))
run = train(ByHand(p), data.train, generator, STEPS, "by hand, no autograd")
trained = calibrate(p, data.train)
for name in ("train", "dev", "test"):
    print(f"{name:<5} loss {trained.loss(getattr(data, name)):.4f}")
"""

CURVE = """
losses = torch.stack(run.losses)
window = max(1, len(losses) // 100)
means = losses[: len(losses) // window * window].view(-1, window).mean(1)
plt.figure(figsize=(7, 4))
plt.plot((torch.arange(len(means)) + 0.5) * window, means)
plt.xlabel("step"); plt.ylabel("minibatch loss (nats per character)"); plt.grid(alpha=0.3);
"""

SAMPLE = """
generator = torch.Generator().manual_seed(1)
print(", ".join(trained.sample(data.vocabulary, "", generator) for _ in range(20)))
"""

FUNCTIONS = """
q, generator = Parameters.draw(len(data.vocabulary))
again = train(with_functions(q), data.train, generator, STEPS, "Functions, backward()")
apart = max(float((a - b).abs().max()) for a, b in zip(p.tensors(), q.tensors()))
print(f"after {STEPS} steps the parameters of the two runs differ by at most {apart:.1e}")
"""


def body_of(function: Callable[..., Any]) -> str:
    """The statements of a function, without its docstring, its first assignment of an empty dict and its return."""
    source = inspect.getsource(function)
    source = source[source.index('"""', source.index('"""') + 3) + 3 :]
    return re.sub(r"\nreturn \w+\n?$", "\n", textwrap.dedent(source.strip("\n"))).strip("\n")


def backward_steps() -> Iterator[tuple[str, str, list[str]]]:
    """Each step of the backward by hand: the comment above it, its statements, the gradients that it finds."""
    comment: list[str] = []
    statements: list[str] = []

    def step() -> tuple[str, str, list[str]]:
        code = "\n".join(statements).strip("\n")
        found = list(dict.fromkeys(re.findall(r'^d\["(\w+)"\](?:\[.*\])? \+?= ', code, re.MULTILINE)))
        return " ".join(line.lstrip("# ") for line in comment), code, found

    for line in body_of(by_hand.staged_backward).split("\n"):
        if (line.startswith("#") or not line) and statements:
            yield step()
            comment, statements = [], []
        if line.startswith("#"):
            comment.append(line)
        elif line:
            statements.append(line)
    yield step()


def cells(steps: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of every cell, kind being "markdown" or "code"."""
    yield "markdown", _TITLE
    yield "code", INSTALL
    yield "code", IMPORTS
    yield "markdown", "## The data\n\nFirst names; three characters of context predict the next."
    yield "code", DATA
    yield "markdown", _NETWORK
    yield "code", DRAW
    yield "code", f"{body_of(network.staged_forward)}\nprint(f\"loss {{v['loss'].item():.4f}}\")"
    yield "markdown", _AUTOGRAD
    yield "code", AUTOGRAD
    yield from _backward_cells()
    yield "markdown", "All 26 beside autograd's, in the order in which they were found:"
    yield "code", "compare_gradients(seen);"
    yield from _one_step_cells()
    yield from _training_cells(steps)


def _backward_cells() -> Iterator[tuple[str, str]]:
    for comment, code, found in backward_steps():
        if not found:
            yield "code", code
            continue
        mathematics = "\n\n".join(f"$${FORMULAS[name]}$$" for name in found)
        yield "markdown", f"{comment}\n\n{mathematics}" if comment else mathematics
        names = ", ".join(f'"{name}"' for name in found)
        yield "code", f"{code}\n\ncheck({names})"


def _one_step_cells() -> Iterator[tuple[str, str]]:
    yield "markdown", _CROSS_ENTROPY
    yield "code", inspect.getsource(by_hand.cross_entropy_backward)
    yield "code", PICTURE
    yield "markdown", _BATCH_NORM
    yield "code", inspect.getsource(by_hand.batch_norm_backward)
    yield "markdown", "Formula and kernel, against the staged gradients above and against autograd:"
    yield "code", "for pairs in fused_pairs(p, x, y):\n    compare_gradients(pairs)"


def _training_cells(steps: int) -> Iterator[tuple[str, str]]:
    yield "markdown", _TRAINING
    constants = "\n".join(f"{name} = {getattr(training, name)!r}" for name in ("MEAN", "IGNORE_INDEX"))
    yield "code", f"ops = torch.ops.fused_ops\n{constants}\nSTEPS = {steps}"
    yield "code", inspect.getsource(training.ByHand)
    yield "code", TRAIN
    yield "code", CURVE
    yield "markdown", "Names it never saw:"
    yield "code", SAMPLE
    yield "markdown", _FUNCTIONS
    yield "code", inspect.getsource(training.WithAutograd)
    yield "code", inspect.getsource(training.with_functions)
    yield "code", FUNCTIONS


_TITLE = """# Backpropagation by hand

Every gradient of a small network, derived one line at a time, compared with autograd, then collapsed into one step for
cross-entropy and one for batch norm. With those two the network is trained without autograd at all. They are what
`fused_ops` computes.
"""
_NETWORK = """## The network

embedding, linear, batch norm, tanh, linear, cross-entropy: in elementary steps, so that each has a derivative one
knows. `v` holds every value by its name.
"""
_AUTOGRAD = """## Step 1: backwards, one line at a time

Write $d\\,x$ for the gradient of the loss with respect to $x$. Three rules do most of the work: a product hands each
factor the gradient times the other factor; what was broadcast in the forward is summed in the backward; what was summed
is broadcast; and what is used twice gets the sum of two gradients.

Autograd's gradients, to compare with:
"""
_CROSS_ENTROPY = r"""## Step 2: cross-entropy in one step

All lines from `logprobs` back to `logits` are one function of the logits,

$$\mathrm{loss}_i = \log \sum_j e^{x_{ij}} - x_{i y_i},$$

and since $\partial \log \sum_k e^{x_{ik}} / \partial x_{ij} = e^{x_{ij}} / \sum_k e^{x_{ik}} = p_{ij}$,

$$d\,x_{ij} = \frac{p_{ij} - [j = y_i]}{n}.$$

The maximum, the exponentials, the sums, the reciprocals and the logarithms are gone. A row of the gradient adds up to
zero: what the right class is pulled up, the others together are pushed down.
"""
_BATCH_NORM = r"""## Step 3: batch norm in one step

With $g = d\,a$, $\hat x_i = (x_i - \mu)\, \sigma^{-1}$ and $v = \frac{1}{n-1} \sum_i (x_i - \mu)^2$ there are three
paths from $x_i$ to the output: through the value itself, through $\mu$ and through $\sigma^{-1}$.

- The value: $\gamma g_i\, \sigma^{-1}$.
- $\sigma^{-1}$: $\sum_k \gamma g_k (x_k - \mu)$ times $\partial \sigma^{-1} / \partial x_i
  = -\tfrac12 \sigma^{-3} \cdot \frac{2 (x_i - \mu)}{n-1}$ (the path of $v$ through $\mu$ adds nothing, since
  $\sum_i (x_i - \mu) = 0$). Together $-\frac{\gamma \sigma^{-1}}{n-1}\, \hat x_i \sum_k g_k \hat x_k$.
- $\mu$: $-\frac{\gamma \sigma^{-1}}{n} \sum_k g_k$.

$$d\,x_i = \frac{\gamma\, \sigma^{-1}}{n}
\Big( n\, g_i - \sum_k g_k - \frac{n}{n-1}\, \hat x_i \sum_k g_k \hat x_k \Big)$$
"""
_TRAINING = """## Step 4: training with these gradients

One step without autograd. The batch norm and the cross-entropy are the kernels of `fused_ops`, forward and backward;
all else is a product or a sum.
"""
_FUNCTIONS = """## The same as a PyTorch user writes it

The two backwards as `torch.autograd.Function`s: `fused_ops.batch_norm` and `fused_ops.cross_entropy`, with
`backward()`.
"""


def notebook(steps: int) -> Any:
    """The notebook of ``nbformat``, not executed."""
    import nbformat
    from nbformat import v4

    made = v4.new_notebook()
    for index, (kind, text) in enumerate(cells(steps)):
        new = v4.new_markdown_cell if kind == "markdown" else v4.new_code_cell
        made.cells.append(new(text.strip("\n"), id=f"cell-{index}"))
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.validate(made)
    return made


def execute(made: Any) -> None:
    """Runs every cell in a kernel of this interpreter; an error of a cell is raised."""
    from nbclient import NotebookClient

    NotebookClient(made, timeout=600, kernel_name="python3").execute()
    for cell in made.cells:
        cell.metadata = {}  # when each ran is nobody's affair
        if "outputs" in cell:
            cell.outputs = [o for o in map(_tidy, cell.outputs) if o is not None]


def _tidy(output: Any) -> Any:
    """Without progress bars and without what names this machine."""
    if output.get("output_type") == "stream" and output.name == "stderr":
        return None
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20_000, help="of training (default: %(default)s)")
    parser.add_argument("--no-run", action="store_true", help="leave the outputs out")
    arguments = parser.parse_args(argv)
    import nbformat

    made = notebook(arguments.steps)
    if not arguments.no_run:
        execute(made)
    nbformat.write(made, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
