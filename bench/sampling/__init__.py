"""Sampling on real text: bias, value error and gradient variance of estimators, by joint law.

    python -m bench.sampling --output-dir runs/sampling

stories260K reads pieces of wikipedia and fiction whose embeddings lowrank perturbs (R = 16, RMS
shift 0.2 of the embeddings' at first, and once after it was trained). A unit of work is a batch of
pieces. It has a reference of its own, a marginal of very many samples that all variants share, and
repeats every variant with the same seeds, interleaved. A variant is an equation with M samples
under one joint law. `measure` has the quantities and `summary` the intervals, over units.

FASTPERTURB_DATA names the folder of the texts and the model, default ../shared/data.
"""
