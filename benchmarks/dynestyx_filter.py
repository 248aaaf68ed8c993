"""The open population of `benchmarks/chains.py` by dynestyx: a particle filter inside of adaptive Metropolis.

For an environment with dynestyx 0.7, which needs Python 3.12; `benchmarks/chains.py --dynestyx PYTHON` calls it. Prints
draws of the three globals, of shape (chains, draws), as JSON.

    python benchmarks/dynestyx_filter.py '[12, 15, 9]' [--particles 200] [--draws 1000] [--chains 2] [--seed 0]
"""

import argparse
import json

import dynestyx as dsx
from dynestyx import DynamicalModel, Filter
from dynestyx.inference.configs.filter import PFConfig
from dynestyx.inference.configs.mcmc import AdaptiveMetropolisConfig
from dynestyx.inference.mcmc import MCMCInference
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import init_to_median

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("seen", type=json.loads)
parser.add_argument("--particles", type=int, default=200)
parser.add_argument("--draws", type=int, default=1000)
parser.add_argument("--chains", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


def population(obs_times, obs_values, ctrl_times=None, ctrl_values=None):
    growth = numpyro.sample("growth", dist.LogNormal(0.0, 0.2))
    initial = numpyro.sample("initial", dist.LogNormal(3.0, 0.5))
    logit = numpyro.sample("logit", dist.Normal(0.0, 0.5))
    with Filter(filter_config=PFConfig(n_particles=args.particles)):
        dynamics = DynamicalModel(
            initial_condition=dist.Poisson(initial[None]).to_event(1),
            state_evolution=lambda x, u, t_now, t_next: dist.Poisson(growth * x + 1.0).to_event(1),
            observation_model=lambda x, u, t: dist.Binomial(x.astype(int), logits=logit).to_event(1),
        )
        dsx.sample("series", dynamics, obs_times=obs_times, obs_values=obs_values)


seen = jnp.array(args.seen)
config = AdaptiveMetropolisConfig(
    num_samples=args.draws, num_warmup=args.draws, num_chains=args.chains, init_strategy=init_to_median
)
draws = MCMCInference(config, population).run(jax.random.key(args.seed), jnp.arange(float(len(seen))), seen[:, None])
draws = {name: np.asarray(value) for name, value in draws.items()}
draws["detection"] = 1 / (1 + np.exp(-draws.pop("logit")))
print(json.dumps({name: draws[name].reshape(args.chains, -1).tolist() for name in ("growth", "initial", "detection")}))
