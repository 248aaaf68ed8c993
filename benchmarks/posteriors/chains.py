"""A kernel of NumPyro's in two chains, advanced block by block until the time is over."""

import jax
from jax import lax, random
import jax.numpy as jnp
import numpy as np

CHAINS, KEPT = 2, 500


class Chains:
    """Chains side by side in one compiled program: the same for warm-up and draws, in blocks of any length.

    This is `numpyro.infer.MCMC` with ``chain_method=jax.vmap``, but for its number of draws, which need not be known.

    :param kernel: of `numpyro.infer`.
    :param args: arguments of the model.
    :param num_warmup: for how many steps it adapts.
    :ivar every: of how many draws one is kept.
    """

    def __init__(self, kernel, args, num_warmup, rng_key):
        self.kernel, self.args, self.every = kernel, args, 1
        states = [kernel.init(key, num_warmup, None, args, {}) for key in random.split(rng_key, CHAINS)]
        self.state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self._run = jax.jit(self._advance)

    def _advance(self, state, num_steps, every):
        sample = jax.vmap(lambda state: self.kernel.sample(state, self.args, {}))
        constrain = jax.vmap(self._latents)
        kept = jax.tree.map(lambda x: jnp.zeros((KEPT, *x.shape), x.dtype), jax.eval_shape(constrain, state.z))

        def step(i, carry):
            state, kept = carry
            state = sample(state)
            keep = lambda kept: jax.tree.map(lambda of, x: of.at[i // every].set(x), kept, constrain(state.z))  # noqa: E731
            return state, lax.cond((i + 1) % every == 0, keep, lambda kept: kept, kept)

        return lax.fori_loop(0, num_steps, step, (state, kept))

    def _latents(self, z):
        """Without deterministic sites, which may depend on latents that are summed out."""
        found = self.kernel.postprocess_fn(self.args, {})(z)
        return {name: found[name] for name in z}

    def advance(self, num_kept):
        """Take ``num_kept`` times ``every`` steps.

        :return: by site, the draws that were kept, of shape ``(num_kept, chains, *shape)``.
        """
        self.state, kept = self._run(self.state, num_kept * self.every, self.every)
        return jax.tree.map(lambda x: np.asarray(x)[:num_kept], kept)

    def warm_up(self, num_steps):
        """Take so many steps, and keep none."""
        self.state, _ = jax.block_until_ready(self._run(self.state, num_steps, num_steps + 1))
