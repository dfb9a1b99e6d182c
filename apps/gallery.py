"""The gallery of a recogniser: known faces, and the numbers that say who a new face shows.

The head of a network has a name for every face, also for those of characters that it has never seen.
So each face is compared with known ones, too, by their embeddings (each a mean over a picture and its
mirror image). A face that is similar to none of them is unknown. An enrolled character is known by
its faces alone, so nothing is trained. Pictures of strangers, which show nobody known, are kept, too:
what is similar to them is less similar to a character. apps/recognize.py builds a gallery and asks it.

    n faces   k strangers   m held-out pictures   D width of an embedding
    C learned characters   G groups of faces
"""

import itertools
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from common import door
from common.checkpoints import file_of
from common.metrics import BINS
from common.train import UserError, read_safetensors, save_safetensors

GALLERY = "gallery.safetensors"
CELLS = BINS**3  # of a histogram of colours
NEAREST = 3  # faces of a character that a picture is compared with, and faces in an answer
WHITENED = 20  # faces of a character that the whitening is fitted to
MOST_LIFT = 3  # standard deviations
LIFT = 0.1  # similarity per standard deviation of the best logit (results/TRIED.md)
SHRINK = 0.3  # share of the mean variance that is added to the covariance
REFUSED = 0.09  # share of known faces that are called unknown, at most
OF_ADDED = (
    0.05  # of added ones, where it is REFUSED of new ones: some show the same drawing as others
)
OTHERS = 0.05  # share of other faces that may pass for one enrolled character
FOLDS = 5  # of the characters, where known ones stand in for unknown ones
LEAST, SHOTS = 3, 5  # pictures that an enrolment needs, and that its threshold is fitted to
SAME = 0.9999  # cosine of two embeddings of one picture, which differ by rounding
HANDICAP = 0.05  # so much less similar are new faces to a mean of SHOTS faces (results/TRIED.md)
AWAY = 0.5  # share of the similarity to strangers that counts against a face (results/TRIED.md)
MANY = 30  # strangers, of whom half of AWAY counts: a few show what a few look like


def gallery_file(run):
    """Where the gallery of a run is read: its own, or of what ships the one that came with it."""
    own = Path(run) / GALLERY
    return own if own.exists() else file_of(run, "head.safetensors").with_name(GALLERY)


@dataclass
class Gallery:
    """Known faces, and the numbers that say who a face shows and whether it is known at all.

    Without the numbers it only compares faces. A character whose faces were added has a mean of its
    own: a learned one may have two, one of what it was taught by and one of what was added.
    """

    # what gallery.safetensors holds
    embeddings: torch.Tensor  # (n, D) of faces; with colours, histograms are the last columns
    labels: torch.Tensor  # (n,), places in `names`
    learned: int  # characters that the head names; their names are the first ones
    trained: int = None  # faces that taught the head, the first ones; None: all of learned ones
    names: list = None
    keys: list = None  # of the faces
    threshold: float = None  # the similarity under which a face is unknown
    enrolled_threshold: float = None  # that of characters whom the head has not learned
    temperature: float = None  # of the logits
    platt: list = None  # see `fit_platt`
    lift: list = None  # see `lift_of`; None leaves the head out of similarities
    colours: float = 0.0  # their weight in a similarity, where the cosine of embeddings has 1
    strangers: torch.Tensor = None  # (k, D) of pictures that show nobody known
    # similarities (m,) of pictures that the network had not learned, before anybody added faces: what
    # `settled` sets the threshold by
    held_known: torch.Tensor = None
    held_unknown: torch.Tensor = None
    refused: float = REFUSED  # share of these known ones that lies below the threshold, at most

    def __post_init__(self):
        if self.trained is None:
            self.trained = int((self.labels < self.learned).sum())
        if self.strangers is None:
            self.strangers = self.embeddings[:0]
        plain = self.embeddings[:, :-CELLS] if self.colours else self.embeddings
        taught = self.labels[: self.trained]
        self.mean, self.matrix = whitening(plain[: self.trained], taught)
        self.unit = self.whitened(self.embeddings)  # (n, D)
        self.faces = self.of_learned(len(self.labels))
        k = len(self.strangers)
        # They count only where the threshold can be moved with them.
        self.away = 0.0 if self.held_known is None else AWAY * k / (k + MANY)

        # Groups of faces: first each learned character as it was taught, then everybody with added faces.
        added, number = self.labels[self.trained :].unique(return_inverse=True)
        self.who = torch.cat([torch.arange(self.learned), added])  # (G,): the character of a group
        self.group = torch.cat([taught, self.learned + number])  # (n,): the group of a face
        self.sums = self.unit.new_zeros(len(self.who), self.unit.shape[1])  # (G, D)
        self.sums.index_add_(0, self.group, self.unit)
        # The more faces a mean is of, the nearer are others to it. One or two faces are no mean yet.
        sizes = self.group.bincount(minlength=len(self.who))[self.learned :]
        handicap = HANDICAP * SHOTS / sizes.clamp(min=SHOTS)
        self.handicap = handicap.where(sizes >= LEAST, 0)  # of each group of added faces

    # -- the file, and changes of it

    @classmethod
    def load(cls, run):
        tensors, header = read_safetensors(gallery_file(run))
        tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
        # what apps/export.py has written beside the numbers is not ours
        return cls(**tensors, **{name: header[name] for name in HEADER if name in header})

    def save(self, run):
        tensors = {name: getattr(self, name) for name in TENSORS}
        tensors = {name: x for name, x in tensors.items() if x is not None}
        header = {name: getattr(self, name) for name in HEADER}
        save_safetensors(tensors, Path(run) / GALLERY, header)

    def shows(self, who):
        """Which faces show this character, (n,) bool?"""
        return torch.tensor([name == who for name in self.names])[self.labels]

    def add(self, who, keys, embeddings):
        """-> the gallery with so many faces (n, D) more of a character, new or not."""
        names = list(dict.fromkeys([*self.names, who]))
        labels = F.pad(self.labels, (0, len(keys)), value=names.index(who))
        strangers = self.strangers[~same_pictures(self.strangers, embeddings).any(1)]
        faces = torch.cat([self.embeddings, embeddings])
        changed = {"embeddings": faces, "labels": labels, "names": names, "keys": self.keys + keys}
        return replace(self, **changed, strangers=strangers).settled()

    def without(self, gone):
        """-> the gallery without these faces, (n,) bool; a name without faces leaves, too.

        Faces that taught the head stay: what it has learned can't be taken out.
        """
        stay = ~gone
        stay[: self.trained] = True
        left, labels = self.labels[stay].unique(return_inverse=True)
        names = [self.names[i] for i in left]
        keys = list(itertools.compress(self.keys, stay))
        changed = {"embeddings": self.embeddings[stay], "labels": labels}
        return replace(self, **changed, names=names, keys=keys).settled()

    def with_strangers(self, embeddings):
        """-> the gallery with embeddings (k, D) of pictures that show nobody known, each once.

        They leave the character that they were added to.
        """
        embeddings = embeddings[:, : self.embeddings.shape[1]]  # some have no colours
        rest = self.without(same_pictures(embeddings, self.embeddings).any(0))
        strangers = torch.cat([self.strangers, embeddings[is_new(embeddings, self.strangers)]])
        return replace(rest, strangers=strangers).settled()

    def enrol(self, who, keys, embeddings):
        """-> the gallery with embeddings (n, D) of pictures `keys`, each once, and lines that say so.

        A picture that was added under another name leaves that one; one that was learned stays there.
        """
        lines = []
        embeddings = embeddings[:, : self.embeddings.shape[1]]  # some have no colours
        same = same_pictures(embeddings, self.embeddings)  # (n, faces)
        has_name = self.shows(who)
        new = is_new(embeddings, self.embeddings[has_name])
        for i, face in (same & ~has_name & new[:, None]).nonzero().tolist():
            name = self.names[self.labels[face]]
            note = f"was added as {name}; it is {who} now"
            if face < self.trained:
                note = f"was learned as {name}; it stays there, too"
            lines.append(f"note: {door.shown(keys[i])} {note}")
        total = int(has_name.sum() + new.sum())
        if total < LEAST:
            raise UserError(f"{total} pictures of {who} are too few; give {LEAST} or more")
        rest = self.without((same & ~has_name).any(0))
        gallery = rest.add(who, [*itertools.compress(keys, new)], embeddings[new])
        line = f"{who} is enrolled with {total} pictures; {len(gallery.names)} characters are known now"
        if who in gallery.names[: gallery.learned]:
            line = f"{who} has {total} pictures, {int(new.sum())} of them new"
        return gallery, [*lines, line]

    def forget(self, who):
        """-> the gallery without the added pictures of a character, and a line that says so."""
        gallery = self.without(self.shows(who))
        count = len(self.keys) - len(gallery.keys)
        if not count:
            how = "was learned in training" if who in self.names else "is not enrolled"
            raise UserError(f"{who} {how}; only enrolled ones can be forgotten, see --list")
        if who in gallery.names:
            return (
                gallery,
                f"{who} is known from training alone; {count} added pictures are forgotten",
            )
        return gallery, f"{who} is forgotten; the gallery knows {len(gallery.names)} characters"

    def move_threshold(self, threshold):
        """Set that of learned characters; that of enrolled ones moves with it, and confidences stay."""
        moved = threshold - self.threshold
        a, b = self.platt
        self.enrolled_threshold += moved
        self.platt = [a, b + a * moved]
        self.threshold = threshold

    # -- similarity

    def whitened(self, embeddings):
        """embeddings (n, D) -> whitened unit vectors (n, D): their products are similarities."""
        embeddings = embeddings[:, : len(self.mean)]  # without histograms
        return F.normalize((embeddings - self.mean) @ self.matrix)

    def of_learned(self, count):
        """-> of each learned character, which of the first `count` faces are its own: indices (k,)."""
        labels = self.labels[:count]
        return [(labels == c).nonzero()[:, 0] for c in labels.unique() if c < self.learned]

    def similarities(self, embeddings, groups, apart=None):
        """embeddings (n, D) -> (n, G): the mean cosine with the three nearest faces of each group.

        With colours it is averaged with the mean cosine of histograms, by their weight. groups: of places
        among faces and, behind them, strangers. apart (n, n + k): faces that are not compared.
        """
        others = torch.cat([self.embeddings, self.strangers])
        scores = nearest_of(self.whitened(embeddings) @ self.whitened(others).T, groups, apart)
        if self.colours:
            # What a network has learned of few pictures tells these characters apart, but says little
            # of others. Colours tell less of each, but the same of all.
            alike = nearest_of(embeddings[:, -CELLS:] @ others[:, -CELLS:].T, groups, apart)
            scores = (scores + self.colours * alike) / (1 + self.colours)
        return scores

    def strange(self, embeddings, same=None):
        """embeddings (n, D) -> (n,): how much of their similarity to strangers counts against them."""
        if not self.away:
            return embeddings.new_zeros(embeddings.shape[0])
        strangers = torch.arange(len(self.strangers)) + len(self.labels)
        return self.away * self.similarities(embeddings, [strangers], same)[:, 0]

    def best_similarity(self, embeddings, apart=False):
        """embeddings (n, D) -> (n,): the similarity to the most similar character, less `strange`.

        apart: a picture that is in the gallery is not compared with itself.
        """
        same = None
        if apart:
            same = same_pictures(embeddings, torch.cat([self.embeddings, self.strangers]))
        best = self.similarities(embeddings, self.faces, same).amax(1)
        return best - self.strange(embeddings, same)

    def similarity(self, logits, embeddings, apart=False):
        """(n, C), (n, D) -> (n,): `best_similarity`, higher where the head is surer than usual.

        LIFT for each standard deviation of the best logit of known faces. Together they separate best.
        """
        return lifted(self.best_similarity(embeddings, apart), logits.amax(1), self.lift)

    # -- what was added moves the threshold

    def settled(self):
        """-> the gallery, whose threshold and confidence are those that added faces and strangers ask for.

        Held-out pictures were asked when the gallery was smaller, so it is added to their similarities how
        much those of other pictures have changed since. Added faces and strangers, which the network has
        not learned either, are asked here, each apart from itself. The head has no part in that.
        """
        if self.held_known is None:
            return self
        is_added = torch.arange(len(self.labels)) >= self.trained
        added = self.embeddings[is_added & (self.labels < self.learned)]
        growth = self.growth()
        known = self.held_known + growth - self.strange(self.embeddings[~is_added]).mean()
        unknown = self.held_unknown + growth
        if len(self.strangers):
            same = same_pictures(self.strangers, torch.cat([self.embeddings, self.strangers]))
            unknown = unknown - self.strange(self.strangers, same).mean()
        asked = [self.best_similarity(x, apart=True) for x in (added, self.strangers)]
        refused = self.refused * len(known) + OF_ADDED * len(added)
        scores = torch.cat([known, asked[0]]), torch.cat([unknown, asked[1]])
        return replace(self, **threshold_of(*scores, refused / len(scores[0])))

    def growth(self):
        """How much more similar faces are to learned characters that are not theirs, by what was added to these.

        Unknown faces are, too, so by this the threshold rises: else, the more was corrected, the fewer
        unknown pictures would be called so. The added faces are asked, which the network has not learned.
        """
        labels, trained = self.labels, self.trained
        corrected = labels[trained:][labels[trained:] < self.learned].unique()
        if not len(corrected):
            return 0.0
        asked = torch.arange(trained, len(labels))
        if len(corrected) == 1:
            # No added face gains by what was added to its own character, so faces of the others are asked.
            asked = torch.cat(data.evenly_of_each(labels[:trained], WHITENED))
            asked = asked[labels[asked] != corrected]
        own = labels[asked, None] == torch.arange(self.learned)
        best = []  # with all faces, and with those that taught the head
        for faces in (self.faces, self.of_learned(trained)):
            similar = self.similarities(self.embeddings[asked], faces)
            best.append(similar.masked_fill(own, -1).amax(1))
        return (best[0] - best[1]).mean().item()

    # -- who is it?

    def to_means(self, unit, same=None):
        """unit (n, D) -> cosines (n, G) with the mean of each group; same (n, faces): which are left out."""
        cosines = unit @ F.normalize(self.sums).T
        if same is not None:
            rows, faces = same.nonzero(as_tuple=True)
            own = self.group[faces]
            others = F.normalize(self.sums[own] - self.unit[faces])
            cosines[rows, own] = (unit[rows] * others).sum(1)
        return cosines

    def decide(self, logits, embeddings, apart=False):
        """-> (n,) who, similarity, margin over its threshold (below 0: unknown), confidence.

        The head names the characters that it learned. Where faces were added, their character wins if
        their mean is nearer, a handicap given, than that of every learned one. Who
        was enrolled is known by this mean, with a threshold of its own.
        confidence: P(the name is right) where half of all pictures show unknown characters;
        nan of a name that added faces gave, and not the head.
        apart: a picture that is in the gallery is not compared with itself.
        """
        who = logits.argmax(1)
        similarity = self.similarity(logits, embeddings, apart)
        margin = similarity - self.threshold
        sure = confidence(logits, margin, self.temperature, self.platt)
        same = same_pictures(embeddings, self.embeddings) if apart else None
        to_mean = self.to_means(self.whitened(embeddings), same)  # (n, G)
        if to_mean.shape[1] == self.learned:  # nobody has added faces
            return who, similarity, margin, sure
        to_added = to_mean[:, self.learned :]
        best, added = (to_added + self.handicap).max(1)
        new = best > to_mean[:, : self.learned].amax(1)
        near = to_added.gather(1, added[:, None])[:, 0]
        name = torch.where(new, self.who[self.learned + added], who)
        enrolled = name >= self.learned
        return (
            name,
            torch.where(enrolled, near, similarity),
            torch.where(enrolled, near - self.enrolled_threshold, margin),
            sure.masked_fill(name != who, torch.nan),
        )

    def names_given(self, logits, embeddings, apart=False):
        """-> the name of each picture, "" where it is unknown; apart: see `decide`."""
        who, _, margin, _ = self.decide(logits, embeddings, apart)
        return [self.names[i] if m >= 0 else "" for i, m in zip(who, margin, strict=True)]


# of the file
TENSORS = ("embeddings", "labels", "strangers", "held_known", "held_unknown")
HEADER = [field.name for field in fields(Gallery) if field.name not in TENSORS]


# ---- similarity ----------------------------------------------------------------------------------


def whitening(embeddings, labels):
    """embeddings (n, D), labels (n,) -> mean (D,), matrix (D, D).

    (x - mean) @ matrix varies alike in all directions in a class (Hatch et al. 2006, WCCN):
    matrix matrix^T is the inverse of the covariance within classes.
    """
    groups = [embeddings[rows] for rows in data.evenly_of_each(labels, WHITENED)]
    means = torch.stack([group.mean(0) for group in groups]).double()
    differences = torch.cat([group.double() - group.mean(0) for group in groups])
    W = differences.T @ differences / max(1, len(differences) - len(groups))
    W += (SHRINK * W.diagonal().mean() + 1e-9) * torch.eye(len(W), dtype=W.dtype)
    return means.mean(0).float(), torch.linalg.cholesky(torch.linalg.inv(W)).float()


def nearest_of(cosines, groups, apart=None):
    """Cosines (n, m) of pictures and faces, places of each group's faces -> (n, G): the mean of its nearest.

    apart (n, m): faces that are not compared.
    """
    if apart is not None:
        cosines = cosines.masked_fill(apart, -1)
    nearest = [cosines[:, own].topk(min(NEAREST, len(own)), 1).values.mean(1) for own in groups]
    return torch.stack(nearest, 1)


def lifted(similarity, strength, lift):
    """Cosines (n,) and best logits (n,) -> (n,), at most 1; lift as of `lift_of`, or None."""
    usual, per_logit = lift or (0.0, 0.0)
    # A head can be far surer of one picture than of any that it was measured by. That is bounded, so
    # that it never names a face that looks like nobody's.
    most = MOST_LIFT * LIFT
    return (similarity + (per_logit * (strength - usual)).clamp(-most, most)).clamp(max=1)


def confidence(logits, margin, temperature, platt):
    """Logits (n, C), margins (n,) -> (n,): P(the name is that of a known face) P(it is known)."""
    a, b = platt
    right_name = (logits / temperature).softmax(1).amax(1)
    return right_name * (a * margin + b).sigmoid()


def same_pictures(embeddings, others):
    """Embeddings (n, D) and (m, D) -> (n, m): are they of one picture?"""
    width = min(embeddings.shape[1], others.shape[1])  # some have no colours
    return F.normalize(embeddings[:, :width]) @ F.normalize(others[:, :width]).T > SAME


def is_new(embeddings, known):
    """Embeddings (n, D) and (m, D) -> (n,): is neither a known one nor one before it the same picture?"""
    same = same_pictures(embeddings, torch.cat([known, embeddings]))
    return ~same.tril(len(known) - 1).any(1)


# ---- calibration: when is it unknown, and how sure is an answer? ---------------------------------


def calibrate(embeddings, labels, held_out):
    """-> a dict of what a gallery needs beside its faces, where a run has held-out pictures.

    held_out: logits (m, C), embeddings (m, D), labels (m,) of known characters. Each of them stands in
    for an unknown one, too.
    """
    logits, known, known_labels = held_out
    gallery = Gallery(embeddings, labels, int(labels.max()) + 1, lift=lift_of(logits))
    return {
        "lift": gallery.lift,
        "enrolled_threshold": enrolled_threshold(gallery, known, known_labels),
        "temperature": fit_temperature(logits, known_labels),
        "held_known": gallery.similarity(logits, known),
        "held_unknown": as_unknown(gallery, held_out),
    }


def threshold_of(known, unknown, refused=REFUSED):
    """Similarities of known faces (m,) and of unknown ones (l,) -> threshold, and Platt's numbers.

    At most the share `refused` of the known is called unknown.
    """
    highest = known.sort().values[int(refused * len(known))].item()
    threshold = min(balance(known, unknown), highest)
    return {"threshold": threshold, "platt": fit_platt(known - threshold, unknown - threshold)}


def lift_of(logits):
    """Logits (m, C) of known held-out faces -> the gallery's lift: the usual one, and similarity per logit."""
    strength = logits.amax(1)
    usual = strength.mean().item()
    spread = strength.std(correction=0).item()
    # A head that is equally sure of all pictures can't say which of them are known. What differs in
    # the last digits is rounding, and divided by it every other logit would be the largest.
    if spread < 1e-4 * max(1.0, abs(usual)):
        return [usual, 0.0]
    return [usual, LIFT / max(spread, 0.1 * abs(usual))]


def as_unknown(gallery, held_out):
    """Similarities (m,) of known faces while a fifth of the characters at a time is left out."""
    logits, known, known_labels = held_out
    similarity = torch.empty(len(known))
    for fold in range(FOLDS):
        stay = gallery.labels % FOLDS != fold
        asked = known_labels % FOLDS == fold
        faces = gallery.embeddings[stay], gallery.labels[stay]
        less = Gallery(*faces, gallery.learned, lift=gallery.lift)
        others = torch.arange(logits.shape[1]) % FOLDS != fold
        similarity[asked] = less.similarity(logits[asked][:, others], known[asked])
    return similarity


def enrolled_threshold(gallery, known, known_labels):
    """The similarity to the mean of SHOTS faces of a character that OTHERS of other faces reach."""
    unit = gallery.whitened(known)
    others = []
    for c in gallery.labels.unique().tolist():
        faces = gallery.unit[gallery.labels == c]
        mean = F.normalize(faces[data.evenly_spaced(len(faces), SHOTS)].sum(0), dim=0)
        others.append((unit @ mean)[known_labels != c])
    others = torch.cat(others).sort(descending=True).values
    return others[int(OTHERS * len(others))].item()


def balance(known, unknown):
    """-> the threshold that rejects as large a share of known (n,) as it accepts of unknown (m,)."""
    thresholds = torch.cat([known, unknown]).sort().values
    rejected = torch.searchsorted(known.sort().values, thresholds) / len(known)
    accepted = 1 - torch.searchsorted(unknown.sort().values, thresholds) / len(unknown)
    return thresholds[(rejected - accepted).abs().argmin()].item()


def fit_temperature(logits, labels):
    """The T for which softmax(logits / T) fits the labels best (Guo et al. 2017, arXiv:1706.04599).

    A logit of -inf is that of a character which a network did not learn.
    """
    grid = torch.logspace(-1, 1.5, 101)
    losses = []
    for T in grid:
        log_p = (logits / T).log_softmax(1)
        # Where all names are right, a T of 0 would fit best, and every name would be certain. So one
        # more picture is counted, which shows each character equally.
        nobody = -log_p[logits > -torch.inf].mean()
        losses.append(F.nll_loss(log_p, labels, reduction="sum") + nobody)
    return grid[torch.stack(losses).argmin()].item()


def fit_platt(known, unknown):
    """Margins of known (n,) and unknown (m,) -> a, b of P(known) = sigmoid(a * margin + b) (Platt 1999).

    Half of all faces count as unknown. Targets are Platt's, (n + 1) / (n + 2) and 1 / (m + 2): few
    faces that are told apart without a mistake do not make it certain.
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([known, unknown])
    n, m = len(known), len(unknown)
    target = torch.cat([torch.full((n,), (n + 1) / (n + 2)), torch.full((m,), 1 / (m + 2))])
    weight = torch.cat([torch.full((n,), 1 / n), torch.full((m,), 1 / m)]) * (n + m) / 2
    twice = torch.cat([x, x])[:, None].numpy()
    y = [1] * (n + m) + [0] * (n + m)
    weights = torch.cat([weight * target, weight * (1 - target)]).numpy()
    fit = LogisticRegression(C=1e3).fit(twice, y, weights)
    return [float(fit.coef_[0, 0]), float(fit.intercept_[0])]
