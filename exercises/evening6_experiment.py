"""Evening 6: is my mask better, or lucky?

Another seed changes the accuracy of a run by some points, so one run of each mask says nothing. Runs with the same
seed see the same pictures in the same crops, and differ in the mask alone. So they are compared in pairs: the
difference for each seed, its mean, and an interval. You write the interval by Student's t, a test that assumes no
distribution, and Holm's correction, which is due where several masks are compared.

Before you run anything, fill in PLAN: what you expect and why, which masks and how many seeds, and which result would
prove you wrong. One mask is a control: it has everything of yours but the reason that you give. For a mask that
follows pixels or a map, that is `shuffle=1`, the score of another picture; for one of places, a mask with the same
shapes elsewhere. When `python -m lab.run mine` has made the runs (README), write REPORT, one paragraph.

A good paragraph says what was compared, on which data, with how many seeds; each difference with its interval and unit;
how the control did; whether that is decided or undecided, by the rule of the plan; what you looked at without having
planned it; and what might differ with more data or longer runs. It does not call an undecided difference a trend.
"""

PLAN = """
"""
REPORT = """
"""


def interval(ours, theirs):
    """Two lists of n numbers, in pairs -> mean, low, high: that of ours - theirs, and its 95 % interval.

    With s the standard deviation of the differences (divided by n - 1): mean +- t s / sqrt(n), where t is the 97.5 %
    quantile of Student's distribution with n - 1 degrees of freedom (scipy.stats.t.ppf).
    """
    raise NotImplementedError


def sign_flips(differences):
    """A list of n differences, n at most 15 -> p of a permutation test, two-sided.

    Had the mask no effect, each difference could as well have the other sign. Of all 2^n choices of signs, p is the
    share whose mean is at least as far from 0 as that of the differences. (Sums are rounded, so allow for 1e-9.)
    """
    raise NotImplementedError


def holm(p):
    """A list of m p-values -> their adjusted ones, a list in the same order (Holm 1979).

    From the smallest on, they are multiplied by m, m - 1, .., 1. Then each becomes the largest of those up to it,
    and at most 1.
    """
    raise NotImplementedError


# Answer in words:
# 1. What is the smallest p that sign_flips can give for three seeds? What follows for your plan?
# 2. How much narrower would an interval be with six seeds instead of three, if s stays the same?
