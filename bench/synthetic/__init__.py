"""The synthetic study: who learns the truth's noise, with what draws, data and certainty.

    python -m bench.synthetic --output-dir runs/synthetic

The demo's language and net, five seeds, 95% t-intervals. Distances are KL(truth || marginal of
256 draws): exact but for those draws, which cost 0.0025 in support and 0.006 outside where the
model is the truth. `arms` says what is trained, `baselines` what stands beside it; `bias` and
`coverage` hold the statistical claims, on a model of 12 words. All numbers are in
results/synthetic/table.md. What was learned:

* Draws. Under iwae the learned noise is gone at M = 2 (sd 0.02, the truth's being 0.3), a quarter
  of the truth's at 4 and half from 8 on. jvi_clip lives at 4, and at 2 with 0.13. quadratic lives
  at 2 (0.27) and gains little from more. mlmc and sumo live once they may reach 8 draws, at 1.7 and
  2.7 draws on average; cut at 2 they collapse like iwae there, whose bias they have, and cut at 4
  they are as far out as iwae at 4. jensen collapses at 16 too.
* The ladder. At M = 16 learned noise has 0.44 times the KL of the best fixed noise in support, 0.64
  and 0.73 in the bands; in band 2 the two intervals overlap and only the paired ratio excludes 1.
  That fixed noise has 0.2 of exact's KL outside and 1.12 of it in support: it does not beat none
  there. At M = 4 learned gains a tenth outside on the best fixed noise, and two thirds in support.
* Few draws. quadratic at M = 2 has 0.49 and 0.56 times the KL of iwae at M = 4 in the two bands,
  jvi_clip at M = 4 has 0.43 and 0.40. So jvi_clip halves it; quadratic in band 1 alone.
* Equal flops: the same steps, and larger batches for fewer draws. Outside sumo, mlmc, iwae and
  jvi_clip at most 16 draws cannot be told apart; the mixture and quadratic follow. In support
  jvi_clip at 16 leads iwae by an eighth. Larger batches make the telescopes what they are; to the
  others, exact included, they give a little in support and take some outside. Our guess, not tested
  apart: each of the 60,000 pairs is seen more often.
* Pairs. Few are memorised: with 500 the noise is learned away (sd 0.001) and learned is as bad as
  exact, where noise fixed at 0.1, which cannot be, has a fifth of its KL. Learned overtakes that at
  8,000 pairs (in band 2 they then stay level) and keeps gaining up to fresh pairs every step.
* Latent dimension. 1 to 16 are alike; with one latent a seed can miss the noisy axis.
* Scale, free trunk. It rises with the truth's but is no estimate of it: the net amplifies what
  noise there is. Where the truth has none, 0.09 is learned all the same and gains nothing outside.
* Scale, trunk held at the truth. Only the sd of the noisy shift is identified, through the mean of
  two tokens. At sd 0.3 and 120,000 pairs the means of iwae from M = 8 on, jvi_clip at 4 and
  quadratic at 2 are within 5%, and but for jvi_clip whole intervals; iwae at 4 is a fifth too
  small, jvi_clip at 8 is 9% too large. iwae at M = 16 is too small at 0.1 (0.078) and too large at
  0.45 (0.513), perhaps because rare outcomes want draws that reach them. quadratic stays within 8%
  at every noise above zero. The exact likelihood of the same pairs is within 1%, so the data do not
  explain it. Some is the noise of the steps, which adds to the norm of U: iwae at M = 64 ends at
  0.309, and three times the steps took one seed at M = 16 from 0.315 to 0.305.
* Intervals. With the marginal known and with the unbiased quadratic equation 95% intervals cover 93
  to 97% (92.7% at n = 250 for quadratic), and errors fall like 1 / sqrt(n). A biased equation's
  errors are right about its own limit, so that they miss the truth the more surely the more data
  there are: iwae at M = 4 covers 79, 49 and 4% at n = 250, 1000 and 4000, at M = 16 still 91%.
  The outer products alone are too small with few draws: half of the spread for iwae at M = 4.
"""
