# Copyright Contributors to the numpyro_vimco project.
# SPDX-License-Identifier: Apache-2.0

"""Sites of the model that are summed out: from an enumerated trace to log-densities without them.

A latent of the model that is marked ``infer={"enumerate": "parallel"}`` and that the guide does not sample is a *summed
site* e. The log-density of a particle is then log Σ_e p(x, z, e). NumPyro's enumeration gives a summed site all values
of its support, along a dimension of its own to the left of all plates. The log-density of each site that depends on it
is a *table* with that dimension, and funsor eliminates the dimensions of connected tables, inside of plates and along
chains. Tables are connected if a summed site is in both: these are a *group*.

What `scan` with history makes of a site ``x`` is NumPyro's convention: ``_PREV_x`` at the first time (with history 2
also ``_PREV__PREV_x``, …) and ``x``, with a dimension for time, at all others. These are *parts* of the site ``x``.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
import re
from typing import Any, NamedTuple

import jax
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.primitives import Messenger

from numpyro_vimco.checks.enumeration_checks import crossed_error, log_prob_shape
from numpyro_vimco.control_flow import carry_inside
from numpyro_vimco.densities.zero_weights import FLOOR
from numpyro_vimco.private.of_funsor import import_funsor, in_logs, names_of_dims
from numpyro_vimco.sites import Trace, is_marked, sample_sites

Group = list[dict]


def summed_sites(model_trace: Trace, sampled: Collection[str]) -> list[str]:
    """The names of the sites that are summed out: marked in the model, and not sampled by the guide."""
    return [name for name, site in model_trace.items() if is_marked(site) and name not in sampled]


def root(name: str) -> str:
    """The name of the site that a site of an enumerated trace is a part of."""
    return re.sub(r"^(_PREV_)*", "", name)


class Unmarked(Messenger):
    """Removes the marks of sites, inside of control flow too, where NumPyro marks all that are finite.

    All sites get a dict ``infer`` of their own: NumPyro writes into it, and sites may share one.

    :param names: of the sites; None for all.
    """

    def __init__(self, fn: Callable, names: Collection[str] | None):
        super().__init__(fn)
        self.names = names

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample":
            msg["infer"] = dict(msg["infer"])
            if self.names is None or msg["name"] in self.names:
                msg["infer"]["enumerate"] = None
        elif msg["type"] == "control_flow":
            names = self.names if _is_enumerated(msg) else None
            carry_inside(msg, lambda program: Unmarked(program, names))


class _AsItIs(Messenger):
    """Leaves control flow that NumPyro cannot enumerate as it is; goes around `enum`, which says otherwise."""

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "control_flow" and not _is_enumerated(msg):
            msg["kwargs"]["enum"] = False


def _is_enumerated(msg: dict) -> bool:
    """Whether NumPyro enumerates sites inside of control flow: of a `scan` with history."""
    return msg["kwargs"].get("history", 0) > 0


def enumerated_trace(model: Callable, args: tuple, kwargs: dict, num_plate_dims: int) -> Trace:
    """The sample sites of a model, with marked ones at all values of their support, and names of all dimensions.

    :param num_plate_dims: number of dimensions that plates may take.
    """
    import_funsor()
    from numpyro.contrib.funsor import enum, plate_to_enum_plate, trace

    with _AsItIs(), plate_to_enum_plate(), enum(first_available_dim=-num_plate_dims - 1):
        found = trace(model).get_trace(*args, **kwargs)
    return {site["name"]: site for site in sample_sites(found)}


def groups(tr: Trace, summed: Collection[str]) -> list[Group]:
    """The sites of an enumerated trace whose log-density depends on summed sites, in connected groups."""
    found = parents_of(tr.values(), summed)
    connected: list[tuple[set[str], set[str]]] = []  # sites and summed sites of each group
    for name, parents in found.items():
        if parents:
            touched = [group for group in connected if group[1] & parents]
            rest = [group for group in connected if not group[1] & parents]
            merged = {name}.union(*(group[0] for group in touched)), parents.union(*(group[1] for group in touched))
            connected = [*rest, merged]
    return [[site for name, site in tr.items() if root(name) in names] for names, _ in connected]


def parents_of(sites: Iterable[dict], summed: Collection[str]) -> dict[str, set[str]]:
    """Of each site, the summed sites that its log-density depends on, itself included.

    :param sites: of an enumerated trace.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for site in sites:
        found[root(site["name"])] |= {root(name) for name in names_of_dims(site).values()} & set(summed)
    return found


def log_sum(group: Group, tables: Mapping[str, Array], summed: Collection[str], kept: Mapping[str, int]) -> Array:
    """The log-density of a group of sites, without its summed sites; in nats.

    :param tables: the log-density of each site of the group at all values of summed sites, by name.
    :param kept: dimension of each plate that is not summed over.
    :return: of shape (…, *plates), of size 1 where a plate is summed over.
    :raises ValueError: naming the sites, for summed sites in crossed plates.
    """
    funsor = import_funsor()
    ops, sum_product = funsor.ops, funsor.sum_product.sum_product
    names = frozenset(name for site in group for name in names_of_dims(site).values())
    sums = frozenset(name for name in names if root(name) in summed)
    factors: list[Any] = []
    in_time: list[tuple[dict, Any]] = []
    for site in group:
        table = tables[site["name"]]
        # funsor drops a dimension of size 1 that has no name, but not the only one.
        table = jnp.squeeze(table) if not names_of_dims(site) else table
        # Where all entries are -inf, derivatives of their sum would be NaN. A NaN entry stays.
        table = jnp.where(table < FLOOR, FLOOR, table)
        factor = funsor.to_funsor(table, output=funsor.Real, dim_to_name=site["infer"]["dim_to_name"])
        if _time(site):
            in_time.append((site, factor))
        else:
            factors.append(factor)
    plates = names - sums - frozenset(kept)
    factors += _without_time(in_time, group, sums, plates)
    try:
        with funsor.interpretations.lazy:
            result = sum_product(ops.logaddexp, ops.add, factors, eliminate=sums | plates, plates=plates)
    except ValueError as error:
        if "intractable" in str(error):
            raise crossed_error({root(name) for name in sums}) from None
        raise
    with in_logs():
        result = funsor.optimizer.apply_optimizer(result)
    left_to_right = sorted((name for name in kept if name in result.inputs), key=lambda name: kept[name])
    value = result.align(tuple(left_to_right)).data if left_to_right else jnp.asarray(result.data)
    shape = [1] * -min(kept.values(), default=0)
    for name in left_to_right:
        shape[kept[name]] = result.inputs[name].size
    value = value.reshape(shape)
    return jnp.where(value < FLOOR / 2, -jnp.inf, value)


def entries_at(table: Array, site: dict, parts: Collection[str], values: Mapping[str, Array]) -> Array:
    """A table at one value of each of its summed sites, for each element of plates and, in `scan`, each of its times.

    :param table: the log-density of ``site``, of an enumerated trace.
    :param parts: names of all sites of the trace.
    :param values: of the summed sites, of their shapes in the model, but with times in turn.
    """
    time_dim = time_dim_of(site)
    num_times = None if time_dim is None else table.shape[time_dim]
    for dim, name in names_of_dims(site).items():
        value = values.get(root(name))
        if value is None:
            continue
        if name != root(name) or f"_PREV_{name}" in parts:  # in `scan`: so many times are sites of their own
            first = sum(root(part) == root(name) for part in parts) - (root(name) in parts)
            time = first - _lag(name)
            value = value[time] if num_times is None else value[time : time + num_times]
        lead = 0 if num_times is None else 1
        shape = value.shape[:lead] + (1,) * (table.ndim - value.ndim) + value.shape[lead:]
        table = jnp.take_along_axis(table, value.reshape(shape), axis=dim)
    return table


class Axes(NamedTuple):
    """Where the values of a summed site of an enumerated trace are.

    :ivar shape: of its log-density, with size 1 along the values of other sites.
    :ivar values: the dimension of its own values, negative.
    :ivar times: number of times that it is at; None for a site outside of `scan`, and for the first times in it.
    """

    shape: tuple[int, ...]
    values: int
    times: int | None


def axes_of(site: dict) -> Axes:
    """The axes of a summed site of an enumerated trace."""
    shape, time = log_prob_shape(site), time_dim_of(site)
    values = next(dim for dim, name in names_of_dims(site).items() if name == site["name"])
    own = {values, time, *(frame.dim for frame in site["cond_indep_stack"])}
    kept = tuple(size if dim in own else 1 for dim, size in zip(range(-len(shape), 0), shape))
    return Axes(kept, values, None if time is None else shape[time])


def _without_time(in_time: list[tuple[dict, Any]], group: Group, sums: frozenset, plates: frozenset) -> list:
    """Factors of sites in `scan`, with time summed over.

    :param in_time: sites with a dimension for time, and their factors.
    :param plates: all that are summed over.
    """
    if not in_time:
        return []
    funsor = import_funsor()
    ops, sum_product = funsor.ops, funsor.sum_product.sum_product
    names_of = {site["name"]: frozenset(names_of_dims(site).values()) for site in group}
    by_time: dict[str, list] = defaultdict(list)
    previous: dict[str, frozenset] = defaultdict(frozenset)
    for site, factor in in_time:
        time = str(_time(site))
        by_time[time].append(factor)
        previous[time] |= {name for name in names_of[site["name"]] if name.startswith("_PREV_")}
    found = []
    for time, factors in by_time.items():
        before = previous[time]
        if not before:  # time is a plate
            found += factors
            continue
        # What the chain is of: the states before, the present ones, and the plates that these are in. The rest is
        # eliminated at each time.
        chain = frozenset().union(before, *({root(name), *names_of[root(name)]} for name in before))
        eliminated = (sums | plates) - chain
        at_each = []
        for connected in _connected(factors, eliminated & sums):
            with funsor.interpretations.lazy:
                factor = sum_product(ops.logaddexp, ops.add, connected, eliminate=eliminated, plates=plates)
            with in_logs():
                at_each.append(funsor.optimizer.apply_optimizer(factor))
        found.append(_summed_backward(at_each, time, before))
    return found


def _connected(factors: list[Any], names: frozenset[str]) -> list[list[Any]]:
    """Factors in groups that share some of these dimensions."""
    groups: list[tuple[set[str], list[Any]]] = []
    for factor in factors:
        own, members = set(factor.inputs) & names, [factor]
        for group in [group for group in groups if group[0] & own]:
            groups.remove(group)
            own, members = own | group[0], group[1] + members
        groups.append((own, members))
    return [members for _, members in groups]


def _summed_backward(factors: list[Any], time: str, before: frozenset[str]) -> Any:
    r"""The product of factors in time, summed over all states s but those before the first time: :math:`\beta_1`, where

    .. math:: \beta_t(s_{t-1}) = \log \sum_{s_t} \exp(\psi_t(s_{t-1}, s_t) + \phi_t(s_t) + \beta_{t+1}(s_t))

    and :math:`\psi` are the factors that depend on states before, :math:`\phi` the others. No site after a `scan`
    depends on its last states, as that is refused. So :math:`\beta` is 0 after the last time. With a history the states
    before are several.

    :param before: names of the states before.
    """
    funsor = import_funsor()
    states = sorted({root(name) for name in before})
    earlier = [f"{'_PREV_' * lag}{state}" for lag in range(max(map(_lag, before)), 0, -1) for state in states]
    domains = {name: domain for factor in factors for name, domain in factor.inputs.items()}
    names = [*earlier, *states, *(name for name in domains if name not in {time, *earlier, *states})]
    kept = [name for name in names if name not in states]
    present = tuple(range(len(earlier), len(earlier) + len(states)))

    def table(factor: Any) -> Array:
        """A factor with all dimensions, of size 1 where it has none."""
        own = [name for name in names if name in factor.inputs]
        data = factor.align((time, *own)).data
        return data.reshape(-1, *(domains[name].size if name in own else 1 for name in names))

    of_pairs = [table(factor) for factor in factors if before & set(factor.inputs)]
    # Without the first of the states before, as what is later has.
    of_one = [jnp.squeeze(table(f), range(1, len(states) + 1)) for f in factors if not before & set(f.inputs)]

    def step(later: Array, tables: tuple[list[Array], list[Array]]) -> tuple[Array, None]:
        later = sum(tables[1], later)
        later = later.reshape((1,) * len(states) + later.shape)
        return logsumexp(sum(tables[0], later), axis=present), None

    sizes = [domains[name].size if name in domains else 1 for name in kept]
    last = jnp.zeros(sizes, jnp.result_type(*of_pairs, *of_one))
    first = jax.lax.scan(step, last, (of_pairs, of_one), reverse=True)[0]
    kept = [name for name in kept if name in domains]
    first = first.reshape([domains[name].size for name in kept])
    return funsor.Tensor(first, OrderedDict((name, domains[name]) for name in kept))


def _time(site: dict) -> str | None:
    """The name of the dimension for time of a site in `scan`."""
    dim = time_dim_of(site)
    return None if dim is None else names_of_dims(site)[dim]


def time_dim_of(site: dict) -> int | None:
    """The dimension for time of a site in `scan`."""
    return next((dim for dim, name in names_of_dims(site).items() if name.startswith("_time_")), None)


def _lag(name: str) -> int:
    """How many times before the present one a part of a site in `scan` is."""
    return (len(name) - len(root(name))) // len("_PREV_")
