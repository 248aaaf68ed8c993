"""Links that pages need not write: of names to the API, of pictures to their full size, and to each error."""

from collections.abc import Iterator
import inspect
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

import numpyro_vimco
from numpyro_vimco import control_variates, plots

# Names of other libraries in docstrings. Their inventories would have to be fetched, and are in none of their packages.
PYRO, JAX = (
    "https://num.pyro.ai/en/stable/",
    "https://docs.jax.dev/en/latest/_autosummary/",
)
ELSEWHERE = {
    "numpyro.infer.SVI": f"{PYRO}svi.html#numpyro.infer.svi.SVI",
    "numpyro.infer.svi.SVIState": f"{PYRO}svi.html#numpyro.infer.svi.SVIState",
    "numpyro.infer.RenyiELBO": f"{PYRO}svi.html#numpyro.infer.elbo.RenyiELBO",
    "numpyro.infer.TraceEnum_ELBO": f"{PYRO}svi.html#numpyro.infer.elbo.TraceEnum_ELBO",
    "numpyro.infer.autoguide.AutoNormal": f"{PYRO}autoguide.html#numpyro.infer.autoguide.AutoNormal",
    "numpyro.infer.init_to_median": f"{PYRO}utilities.html#numpyro.infer.initialization.init_to_median",
    "jax.random.key": f"{JAX}jax.random.key.html",
    "jax.random.PRNGKey": f"{JAX}jax.random.PRNGKey.html",
}


def link_elsewhere(app, env, node: nodes.Element, content: nodes.Element):
    """The page of another library for a name in a docstring; None for others."""
    address = ELSEWHERE.get(node["reftarget"])
    return (
        nodes.reference("", "", content, internal=False, refuri=address)
        if address
        else None
    )


def public_names() -> Iterator[tuple[str, str]]:
    """What a page writes for a name, and the full name under which the page of the API has it."""
    for name in numpyro_vimco.__all__:
        value = getattr(numpyro_vimco, name)
        yield (
            name,
            value.__name__ if inspect.ismodule(value) else f"numpyro_vimco.{name}",
        )
    for name in vars(numpyro_vimco.Posterior):
        if not name.startswith("_"):
            full = f"numpyro_vimco.Posterior.{name}"
            yield from ((f"posterior.{name}", full), (f"Posterior.{name}", full))
    yield "to_arviz", "numpyro_vimco.Posterior.to_arviz"
    for module in (plots, control_variates):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                full = f"{value.__module__}.{name}"
                yield from (
                    (name, full),
                    (f"{module.__name__.split('.')[-1]}.{name}", full),
                )


class LinkNames(SphinxTransform):
    """A public name in code font, with arguments or without, links to its place in the API."""

    default_priority = (
        410  # after footnotes and substitutions, before cross-references are resolved
    )
    targets = dict(public_names())

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        for literal in list(self.document.findall(nodes.literal)):
            name = re.fullmatch(r"([\w.]+)(\(.*\))?", literal.astext(), flags=re.DOTALL)
            target = self.targets.get(name[1]) if name else None
            if target is None or inside(
                literal, (nodes.reference, nodes.title, addnodes.pending_xref)
            ):
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refwarn=True,
            )
            link["refdoc"] = self.env.docname
            literal.replace_self(link)
            link += literal


class EnlargePictures(SphinxTransform):
    """A picture is as wide as the column at most, and links to its full size. Those of cards are left alone."""

    default_priority = 411

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        for image in self.document.findall(nodes.image):
            of_card = any(name.startswith("sd-") for name in image["classes"])
            if not of_card and not inside(image, (nodes.reference,)):
                image.setdefault("width", "100%")  # Sphinx links what is scaled


class AnchorErrors(SphinxTransform):
    """Each message of the index of errors has an anchor, made of its first words that are the library's own."""

    default_priority = 412

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        if self.env.docname != "errors":
            return
        for quotation in list(self.document.findall(nodes.block_quote)):
            first = quotation.next_node(nodes.paragraph)
            kind = first.next_node(nodes.strong) if first is not None else None
            if kind is None or not first.astext().startswith(kind.astext()):
                continue
            words = re.findall(r"\w+", first.astext().replace("…", ""))[1:9]
            anchor = unique(nodes.make_id(" ".join(words)), self.document.ids)
            quotation["ids"].append(anchor)
            self.document.ids[anchor] = quotation
            first += nodes.reference(
                "",
                "#",
                refid=anchor,
                internal=True,
                classes=["headerlink", "error-link"],
            )


class AnchorSources(SphinxTransform):
    """The pages of source code link each object of a module under the prefix of the first that the API has of it."""

    default_priority = 413

    def apply(self, **kwargs) -> None:
        """Called by Sphinx, once for each page."""
        for signature in self.document.findall(addnodes.desc_signature):
            name = f"numpyro_vimco.{signature.get('fullname')}"
            if "fullname" in signature and name not in self.document.ids:
                signature["ids"].append(name)
                self.document.ids[name] = signature


def unique(anchor: str, taken) -> str:
    """The anchor, with a number if another has it."""
    number = 1
    while (numbered := anchor if number == 1 else f"{anchor}-{number}") in taken:
        number += 1
    return numbered


def inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    """Whether a node has a parent of one of these kinds."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def setup(app) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("missing-reference", link_elsewhere)
    for transform in (LinkNames, EnlargePictures, AnchorErrors, AnchorSources):
        app.add_transform(transform)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
