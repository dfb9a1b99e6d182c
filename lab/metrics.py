"""What is measured, as pure functions of tensors: no files, no models. Imports nothing of ours."""

import torch
import torch.nn.functional as F

# ---- nearest neighbours --------------------------------------------------------------------------------------------


def knn_votes(bank, bank_labels, queries, classes, k=20, temperature=0.07):
    """Votes of the k nearest of bank (n, D) for each class: queries (Q, D) -> (Q, classes).

    Cosine similarity s, votes weighted by exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4).
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for rows in torch.arange(len(queries)).split(4096):
        similarity, nearest = (queries[rows] @ bank.T).topk(min(k, len(bank)), dim=1)  # (q, k)
        votes[rows] = votes[rows].scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
    return votes


def knn_top1(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Share of queries (Q, D) whose class wins among their k nearest of bank (n, D), in [0, 1]."""
    votes = knn_votes(bank, bank_labels, queries, int(bank_labels.max()) + 1, k, temperature)
    return (votes.argmax(1) == labels).float().mean().item()


def retrieval(features, labels, groups, most=5000):
    """Each image asks all the others for its class: {"map", "recall1", "recall5"} in [0, 1]; features (n, D), cosine.

    groups (n) i64: images of one illustration never answer each other. Queries without a right answer are left out;
    of more than `most` images an even spread is taken. Recall@k: a right one is among the first k.
    """
    rows = torch.linspace(0, len(labels) - 1, min(len(labels), most)).long()
    features, labels, groups = F.normalize(features[rows].float(), dim=1), labels[rows], groups[rows]
    precision, first, fifth = [], [], []
    for part in torch.arange(len(rows)).split(512):
        similarity = (features[part] @ features.T).masked_fill(groups[part][:, None] == groups, float("-inf"))
        order = similarity.argsort(dim=1, descending=True, stable=True)
        allowed = similarity.gather(1, order) > float("-inf")
        right = (labels[order] == labels[part][:, None]) & allowed  # (q, n), the nearest first
        asked = right.any(1)
        precision.append(average_precision(right[asked]))
        first.append(right[asked][:, :1].any(1))
        fifth.append(right[asked][:, :5].any(1))
    names = ("map", "recall1", "recall5")
    return {k: torch.cat(v).double().mean().item() for k, v in zip(names, (precision, first, fifth), strict=True)}


def average_precision(right):
    """right (q, n) bool, the best ranked first -> (q,): mean of the precision at the rank of each right one."""
    hits = right.double().cumsum(1)
    ranks = torch.arange(1, right.shape[1] + 1, dtype=torch.float64)
    return (hits / ranks * right).sum(1) / right.sum(1)


def draw_episodes(bank_labels, labels, ways, shots, generator, episodes=600, asked=15):
    """-> examples (episodes, ways, shots) in the bank and questions (episodes, ways, asked) among those to be named.

    Where a class has fewer than `asked` questions the rest are -1. None where too few classes have enough images.
    Examples and questions come from different splits: no illustration is on both sides.
    """
    own = [((bank_labels == c).nonzero()[:, 0], (labels == c).nonzero()[:, 0]) for c in labels.unique()]
    able = [(e, q) for e, q in own if len(e) >= shots and len(q)]
    if len(able) < ways:
        return None
    examples = torch.empty(episodes, ways, shots, dtype=torch.long)
    questions = torch.full((episodes, ways, asked), -1)
    for i in range(episodes):
        for j, c in enumerate(torch.randperm(len(able), generator=generator)[:ways].tolist()):
            own_examples, own_questions = able[c]
            examples[i, j] = own_examples[torch.randperm(len(own_examples), generator=generator)[:shots]]
            count = min(asked, len(own_questions))
            questions[i, j, :count] = own_questions[torch.randperm(len(own_questions), generator=generator)[:count]]
    return examples, questions


def few_shot(bank, queries, examples, questions):
    """Accuracy of each episode, (episodes,), by nearest centroid in cosine; bank (n, D), queries (Q, D) of two splits.

    Snell et al. 2017 with the metric of Chen et al. 2019, "A Closer Look at Few-shot Classification"; features are
    centred on the bank's mean first.
    """
    centre, result = bank.float().mean(0), []
    bank, queries = F.normalize(bank.float() - centre, dim=1), F.normalize(queries.float() - centre, dim=1)
    for e, q in zip(examples.split(20), questions.split(20), strict=True):
        centroids = F.normalize(bank[e].mean(2), dim=2)  # (E, ways, D)
        found = (queries[q].flatten(1, 2) @ centroids.transpose(1, 2)).argmax(2).view(q.shape)
        right = (found == torch.arange(q.shape[1])[:, None]) & (q >= 0)
        result.append(right.sum((1, 2)).double() / (q >= 0).sum((1, 2)))
    return torch.cat(result)


# ---- classification ------------------------------------------------------------------------------------------------


def topk(scores, labels, k):
    """Share of rows of scores (n, C) whose label is among the k highest, in [0, 1]."""
    return (scores.topk(min(k, scores.shape[1]), dim=1)[1] == labels[:, None]).any(1).double().mean().item()


def confusion(found, labels, classes):
    """found, labels (n) i64 -> (classes, classes) i64: row the true class, column the one found."""
    return torch.bincount(labels * classes + found, minlength=classes**2).view(classes, classes)


def macro_f1(table):
    """Confusion (C, C) -> mean over classes of 2 TP / (2 TP + FP + FN); a class neither there nor found is left out."""
    right, seen = table.diagonal().double(), (table.sum(0) + table.sum(1)).double()
    return (2 * right / seen)[seen > 0].mean().item()


def recalls(table):
    """Confusion (C, C) -> (C,) share found of each true class; nan where it has no images."""
    return table.diagonal().double() / table.sum(1)


def by_frequency(table, counts, many=100, few=20):
    """Accuracy over classes with > many, between, and < few training images -> {"head", "mid", "tail"}, None if empty.

    The bounds are those of ImageNet-LT (Liu et al. 2019, arXiv:1904.05160). Shares of images, not means of classes.
    """
    groups = {"head": counts > many, "mid": (counts >= few) & (counts <= many), "tail": counts < few}
    total = {name: table[which].sum().item() for name, which in groups.items()}
    right = {name: table.diagonal()[which].sum().item() for name, which in groups.items()}
    return {name: right[name] / total[name] if total[name] else None for name in groups}


def frequency_correlation(table, counts):
    """Pearson's r of a class's recall and the logarithm of its training images; None where either does not vary."""
    here = (table.sum(1) > 0) & (counts > 0)
    pair = torch.stack([recalls(table)[here], counts[here].double().log()])
    if here.sum() < 3 or (pair.std(1) < 1e-9).any():
        return None
    return torch.corrcoef(pair)[0, 1].item()


def classification(scores, labels, counts):
    """Everything about scores (n, C) against labels (n); counts (C) training images -> a dict, shares in [0, 1]."""
    classes = len(counts)
    table = confusion(scores.argmax(1), labels, classes)
    own = [None if r != r else r for r in recalls(table).tolist()]
    return {"top1": topk(scores, labels, 1), "top5": topk(scores, labels, 5), "macro_f1": macro_f1(table),
            **by_frequency(table, counts), "frequency_correlation": frequency_correlation(table, counts),
            "per_class": own, "confusion": table.tolist()}  # fmt: skip


# ---- learning curves -----------------------------------------------------------------------------------------------


def first_crossing(xs, ys, threshold):
    """The x at which ys first reach threshold, straight lines between the points; None where they never do."""
    for i, y in enumerate(ys):
        if y >= threshold:
            if i == 0:
                return float(xs[0])
            share = (threshold - ys[i - 1]) / (y - ys[i - 1])
            return float(xs[i - 1] + share * (xs[i] - xs[i - 1]))
    return None


# ---- pictures ------------------------------------------------------------------------------------------------------


def thumbnails(images, side):
    """images u8 (n, S, S, 3) -> (n, side*side*3) in [-.5, .5]: the mean colour of each of side x side cells.

    The control of every feature: what colour alone recognises.
    """
    small = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), side)
    return small.flatten(1) / 255 - 0.5


def psnr(a, b, where):
    """Peak signal-to-noise ratio in dB of u8 pictures a, b (n, S, S, 3) over the pixels where (n, S, S) is true: (n,).

    10 log10(255^2 / mean squared error); nan where no pixel is asked for.
    """
    error = (a.double() - b.double()).square().mean(3)
    return 10 * torch.log10(255**2 * where.sum((1, 2)) / (error * where).sum((1, 2)))


def ssim_map(a, b):
    """Structural similarity of u8 pictures a, b (n, S, S, 3) at every pixel, mean over colours: (n, S, S).

    Wang et al. 2004: an 11 x 11 Gaussian window of deviation 1.5, K1 .01, K2 .03, population covariance.
    """
    x = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    line = line / line.sum()
    a, b = (p.permute(0, 3, 1, 2).double() for p in (a, b))

    def blur(p):
        p = F.pad(p, (5, 5, 5, 5), "reflect").flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(p, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).view_as(a)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(1)


# ---- maps against truth ----------------------------------------------------------------------------------------------


def auc(score, truth):
    """Area under the ROC curve in [0, 1]: how often a true entry outranks a false one; score (n,), truth (n,) bool.

    By ranks (Mann and Whitney 1947); equal scores share their mean rank. NaN where only one kind is there.
    """
    values, where, count = torch.unique(score, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[where].double()  # from 1
    true, false = int(truth.sum()), int((~truth).sum())
    if not true or not false:
        return float("nan")
    return ((rank[truth].sum() - true * (true + 1) / 2) / (true * false)).item()


def iou(found, truth):
    """Intersection over union of two bool tensors, in [0, 1]; 1 where both are empty."""
    union = (found | truth).sum()
    return ((found & truth).sum() / union).item() if union else 1.0


def adjusted_rand(a, b):
    """Agreement of two clusterings (n,) of whole numbers: 1 is the same up to names, 0 what chance gives.

    (Index - expected) / (maximum - expected), the index being the number of pairs that are together in both (Hubert
    and Arabie 1985).
    """
    _, a = torch.unique(a, return_inverse=True)
    _, b = torch.unique(b, return_inverse=True)
    table = torch.bincount(a * (int(b.max()) + 1) + b, minlength=(int(a.max()) + 1) * (int(b.max()) + 1)).double()
    table = table.view(int(a.max()) + 1, -1)
    pairs = lambda counts: (counts * (counts - 1) / 2).sum()  # noqa: E731
    together, in_a, in_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = in_a * in_b / pairs(table.sum())
    most = (in_a + in_b) / 2
    return 1.0 if most == expected else ((together - expected) / (most - expected)).item()


# ---- verification and open set: scores of pairs that belong together (positive) and of pairs that do not -------------


def pair_cosines(embeddings, labels, groups):
    """Cosine of every pair of rows -> (of one class, of different classes); pairs of one group (i64) are left out.

    Two faces of one illustration are alike for reasons that have nothing to do with who they are.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), 1)
    apart = groups[i] != groups[j]
    i, j = i[apart], j[apart]
    cosine = torch.cat([(unit[a] * unit[b]).sum(1) for a, b in zip(i.split(2**18), j.split(2**18), strict=True)])
    same = labels[i] == labels[j]
    return cosine[same], cosine[~same]


def roc(positive, negative):
    """Scores -> false and true positive rates (fp64) of "accept from here on", for each distinct score, from 0 to 1."""
    scores = torch.cat([positive, negative]).double()
    is_true = torch.arange(len(scores)) < len(positive)
    scores, order = scores.sort(descending=True)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # of equal scores
    true = is_true[order].cumsum(0)[last].double()
    false = (~is_true[order]).cumsum(0)[last].double()
    zero = true.new_zeros(1)
    return torch.cat([zero, false / len(negative)]), torch.cat([zero, true / len(positive)])


def roc_auc(positive, negative):
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half."""
    return torch.trapezoid(*roc(positive, negative)[::-1]).item()


def tpr_at_fpr(positive, negative, most):
    """The largest true positive rate at a false positive rate of at most `most`."""
    false, true = roc(positive, negative)
    return true[false <= most].max().item()


def equal_error_rate(positive, negative):
    """Where the ROC curve has as many false accepts as false rejects, interpolated on a straight line."""
    false, true = roc(positive, negative)
    gap = false - (1 - true)  # rises from -1 to 1
    k = int((gap >= 0).nonzero()[0])
    share = -gap[k - 1] / (gap[k] - gap[k - 1])
    return (false[k - 1] + share * (false[k] - false[k - 1])).item()


def precision_recall(positive, negative):
    """Scores -> precision and recall (fp64) for each distinct score, from the highest on."""
    false, true = roc(positive, negative)
    hits, wrong = true[1:] * len(positive), false[1:] * len(negative)
    return hits / (hits + wrong), true[1:]


def ranked_precision(positive, negative):
    """Average precision: the sum of precision times the step in recall, over the distinct scores."""
    precision, recall = precision_recall(positive, negative)
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum().item()


def detection_rate(known, right, strangers, far):
    """Detection and identification rate, DIR, at a false alarm rate of at most far (Phillips et al. 2011, chapter 21).

    known (n,) scores of known faces, right (n,) whether the best name is theirs, strangers (m,) scores of unknown
    ones: the share of known faces that are named rightly at or above the lowest score that lets few strangers in.
    """
    allowed = int(far * len(strangers) + 1e-9)
    bar = strangers.sort(descending=True).values[allowed] if allowed < len(strangers) else float("-inf")
    return ((known > bar) & right).double().mean().item()
