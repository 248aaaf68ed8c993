"""Two topics in nine titles of papers: latent Dirichlet allocation of 29 words, each with its topic as a latent.

Five titles are of human-computer interaction, and four of graphs; "survey" is in one of each. Topics may change places,
and what is asked does not depend on which is which. Data: the words that occur in two titles or more, in the example of
Deerwester et al., "Indexing by latent semantic analysis", Journal of the American Society for Information Science 41
(1990), Table 2. The model is that of Blei, Ng & Jordan, Journal of Machine Learning Research 3 (2003), with two topics.

Truth: exact. Shares are integrated out by algebra, and the 2^29 topics of all words are summed by their counts.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import beta, gammaln

from benchmarks.posteriors import exact_probabilities

TITLES = """
    human interface computer / survey user computer system response time / user interface system eps /
    system human system eps / user response time / trees / graph trees / graph minors trees / graph minors survey
"""
WORDS = [title.split() for title in TITLES.split("/")]
VOCABULARY = list(dict.fromkeys(itertools.chain(*WORDS)))
NUMBERS = np.array([VOCABULARY.index(word) for word in itertools.chain(*WORDS)])
# Positions of pairs of different words, each where it is first.
PAIRS = np.array(list(itertools.combinations(np.unique(NUMBERS, return_index=True)[1], 2))).T
IN_TITLE, IN_TOPIC = 0.5, 0.3  # concentrations of the shares of topics in a title, and of words in a topic


def data():
    """Words, as numbers in the vocabulary, and how many there are in each title."""
    return jnp.array(NUMBERS), jnp.array([len(title) for title in WORDS])


def model(word, length):
    """``word`` has shape (words,), and ``length`` (titles,)."""
    with numpyro.plate("topics", 2):
        words = numpyro.sample("words_of_topic", dist.Dirichlet(jnp.full(len(VOCABULARY), IN_TOPIC)))
    with numpyro.plate("titles", len(length)):
        topics = numpyro.sample("topics_of_title", dist.Dirichlet(jnp.full(2, IN_TITLE)))
    title = jnp.repeat(jnp.arange(len(length)), length, total_repeat_length=len(word))
    with numpyro.plate("words", len(word)):
        topic = numpyro.sample("topic", dist.Categorical(topics[title]))
        numpyro.sample("word", dist.Categorical(words[topic]), obs=word)


def enumerated(*args):
    from numpyro.contrib.funsor import config_enumerate

    config_enumerate(model)(*args)


def asked(draw, word, length):
    """Which pairs of words have the same topic, and how probable each word is as the next one of the last title."""
    one, other = PAIRS
    together = draw["topic"][one] == draw["topic"][other]
    return {"together": together, "next_word": draw["topics_of_title"][-1] @ draw["words_of_topic"]}


def pymc_model(word, length):
    import pymc as pm

    title = np.repeat(np.arange(len(length)), length)
    with pm.Model() as built:
        words = pm.Dirichlet("words_of_topic", np.full((2, len(VOCABULARY)), IN_TOPIC))
        topics = pm.Dirichlet("topics_of_title", np.full((len(length), 2), IN_TITLE))
        topic = pm.Categorical("topic", topics[title], shape=len(word))
        pm.Categorical("word", words[topic], observed=np.asarray(word))
    return built


def of_words(shape):
    """Probability of a topic's words, in their order, by how often each is there."""
    counts = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    total = IN_TOPIC * len(VOCABULARY)
    log_probability = sum(gammaln(IN_TOPIC + n) - gammaln(IN_TOPIC) for n in counts)
    return np.exp(log_probability + gammaln(total) - gammaln(total + sum(counts)))


def grown(x, axes, widths):
    """With so many zeros before and after it along some axes."""
    return np.pad(x, [widths if axis in axes else (0, 0) for axis in range(x.ndim)])


def joint_of_counts(word, length, in_first=()):
    """Joint probability of the words and of how many are in the first topic.

    :param in_first: positions of words that are known to be in the first topic.
    :return: its axes are the number of words of the last title, and of each word of the vocabulary.
    """
    joint, position = np.ones([1] * len(VOCABULARY)), 0
    for words in np.split(word, np.cumsum(length)[:-1]):
        joint = joint[None]
        for axis in 1 + words:
            second = 0 if position in in_first else grown(joint, (0, axis), (0, 1))
            joint, position = second + grown(joint, (0, axis), (1, 0)), position + 1
        first = IN_TITLE + np.arange(len(words) + 1)
        of_title = beta(first, first[::-1]) / beta(IN_TITLE, IN_TITLE)
        joint = joint * np.expand_dims(of_title, tuple(range(1, joint.ndim)))
        last, joint = joint, joint.sum(0)
    in_topic = of_words(joint.shape)
    return last * in_topic * np.flip(in_topic)


def next_word(joint):
    """Mean and mean square of the probability of each word as the next one of the last title.

    Both topics contribute the same, as they may change places.

    :param joint: probability of counts, as of `joint_of_counts`.
    """
    first = IN_TITLE + np.arange(len(joint))  # and the same of the second topic in reverse
    both = first + first[::-1]
    averages = first / both, first * (first + 1) / (both * (both + 1)), first * first[::-1] / (both * (both + 1))
    of_title, of_square, of_product = (np.tensordot(x, joint, 1) for x in averages)
    counts = [IN_TOPIC + n for n in np.meshgrid(*map(np.arange, of_title.shape), indexing="ij", sparse=True)]
    in_topic, mean, square = sum(counts), [], []
    for n in counts:
        share = n / in_topic
        mean.append(2 * (of_title * share).sum())
        square.append(2 * (of_square * share * (n + 1) / (in_topic + 1) + of_product * share * np.flip(share)).sum())
    return np.array(mean), np.array(square)


def truth(word, length):
    word, length = np.asarray(word), np.asarray(length)
    joint = joint_of_counts(word, length)
    total = joint.sum()
    together = [2 * joint_of_counts(word, length, pair).sum() / total for pair in zip(*PAIRS)]
    source = "sums over the topics of all words by their counts, shares by algebra"
    found = exact_probabilities({"together": together}, np.log(total), source)
    mean, square = next_word(joint / total)
    for part, x in ((found.means, mean), (found.sds, np.sqrt(square - mean**2)), (found.errors, 0 * mean)):
        part["next_word"] = x
    return found
