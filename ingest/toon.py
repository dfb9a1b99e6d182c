"""Procedural anime faces: a labelled picture set which anybody may draw, keep and publish.

    python -m ingest.toon --who haruka --out haruka.png    # a picture that no data set has

Read in this order: `cast` and `plan` (who is in the data set), `Canvas` (how a shape reaches the pixels), `draw` at
the end (what is drawn, back to front), and then any drawing that you are curious about.

Everything is drawn in head units: the face is 1 wide, the origin is its centre, x points right and y down.
Drawings are text, in hundredths: "20,-76! 34,-105" is a curve from (0.20, -0.76), where it has a sharp corner,
to (0.34, -1.05). Colours are (hue in degrees, saturation, value): light and shadow are easy to say so. They are
shared by characters, and differ from picture to picture; a character is a combination of shapes.
"""

import colorsys
import re
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from common.locks import reserve
from common.train import Parser, at_least, atomic, between, cli

COUNT, CHARACTERS = 2400, 48  # of the demo set: its drawings, and whom they show
MOST = 500  # characters: with many more, `cast` looks for long until each differs from each
SS = 4  # supersampling: everything is drawn four times too large and then reduced
PARTS = ("background", "hair", "face", "eyes", "mouth", "clothes", "accessory")  # id = position
# fmt: off
ATTRIBUTES = {  # what makes a character; "no_..." is dealt four times as often as other values
    "hair_style": ("bob_cut", "long_hair", "twintails", "ponytail", "messy_hair", "drill_hair",
                   "double_bun", "hime_cut", "braid", "wavy_hair", "side_ponytail",
                   "low_twintails"),
    "fringe": ("blunt_bangs", "choppy_bangs", "swept_bangs", "parted_bangs", "curtain_bangs",
               "hair_over_one_eye"),
    "ahoge": ("no_ahoge", "ahoge", "double_ahoge"),
    "glasses": ("no_glasses", "round_glasses", "square_glasses"),
    "hair_colour": ("blonde", "brown", "black", "pink", "blue", "silver"),
    "eye_colour": ("blue", "green", "red", "purple", "amber", "brown"),
    "eye_shape": ("round_eyes", "tsurime", "tareme", "jitome"),
    "iris": ("plain_iris", "ringed_iris", "star_iris", "heart_iris", "slit_pupils", "cross_iris"),
    "mark": ("no_mark", "mole_under_eye", "freckles", "bandaid", "star_tattoo", "whisker_markings"),
    "accessory": ("no_accessory", "hair_bow", "hairclip", "headphones", "cat_ears", "fox_ears",
                  "rabbit_ears", "horns", "halo", "beret", "hair_flower", "hairband", "witch_hat"),
    "outfit": ("sailor_collar", "hoodie", "necktie", "kimono", "frills", "turtleneck"),  # tendency
    "clothes_colour": ("navy", "crimson", "cream", "forest", "lilac", "sky"),  # tendency
}
HAIR = {"blonde": (44, .50, .97), "brown": (20, .50, .58), "black": (238, .26, .34),
        "pink": (344, .36, .97), "blue": (212, .52, .86), "silver": (232, .09, .91)}
IRIS = {"blue": (214, .80, .88), "green": (150, .72, .70), "red": (352, .78, .88),
        "purple": (274, .62, .86), "amber": (38, .85, .95), "brown": (18, .65, .58)}
CLOTH = {"navy": (226, .55, .44), "crimson": (352, .66, .74), "cream": (42, .14, .97),
         "forest": (158, .42, .50), "lilac": (268, .28, .82), "sky": (204, .36, .92)}
TRINKET = ((352, .7, .88), (338, .42, .98), (44, .6, .97), (178, .45, .8), (262, .35, .55),
           (235, .06, .98))
WHITE = (235, .02, 1)
INK = (262, .45, .24)
SKIN = (20, .21, 1)
MOUTH = (354, .6, .66)
PAINTS = (  # tones that are the same in all pictures: a name, the part that they are of, a colour
    ("bubble", "background", WHITE),
    ("shirt", "clothes", WHITE),
    ("fluff", "accessory", (350, .28, .98)),
    ("pale", "accessory", (45, .08, 1)),
    ("gold", "accessory", (46, .55, 1)),
    ("dark", "accessory", (255, .3, .3)),
    ("dough", "accessory", (32, .42, .88)),
    ("dots", None, INK),
    ("teeth", None, WHITE),
    ("tongue", None, (2, .5, .9)),
    ("red", None, (355, .7, .8)),
    ("tattoo", None, (265, .5, .7)),
    ("water", None, (200, .3, 1)),
)
EYES = {  # width, height, tilt
    "round_eyes": (.15, .195, -.03),
    "tsurime": (.16, .175, -.2),
    "tareme": (.155, .18, .17),
    "jitome": (.165, .195, -.02),
}
GRADES = {  # saturation times, value times, value plus
    "natural": (1, 1, 0), "vivid": (1.2, 1.02, 0), "pastel": (.6, .85, .17),
    "muted": (.7, .94, .02), "dusk": (.9, .84, 0), "monochrome": (.03, .95, .03),
}
MOODS = {  # how open the eyes are, (brow lift, brow slant), mouth, a sign which may come with it
    "smile": ((1, 1), (0, 0), "smile", "sweat"),
    "open_mouth": ((1, 1), (.02, 0), "open", ""),
    "surprised": ((1.1, 1.1), (.06, -.2), "o", "sweat"),
    "angry": ((.8, .8), (-.03, 1), "frown", "vein"),
    "sad": ((.85, .85), (0, -1), "wavy", "tears"),
    "serious": ((.85, .85), (-.01, .4), "flat", ""),
    "wink": ((1, 0), (.02, 0), "cat", ""),
    "happy": ((0, 0), (.03, 0), "laugh", ""),
    "sleepy": ((-1, -1), (0, -.2), "flat", ""),
    "pout": ((.9, .9), (0, .5), "pout", ""),
    "cat_smile": ((1, 1), (.02, 0), "cat", ""),
    "laugh": ((.95, .95), (.03, 0), "laugh", ""),
}
LINES = {"fine": (.013, None), "bold": (.021, None), "dark": (.016, INK)}  # width, one colour
TURNS = {"frontal": .2, "turned": .4, "far turned": np.inf}  # of the head, in radians, at most
FOOD, HATS = ("doughnut", "popsicle", "lollipop", "onigiri"), ("beret", "witch_hat")
PATTERNS = ("dotted_background", "striped_background", "sky", "window", "bokeh", "sunburst",
            "night_sky")
# fmt: on
STRATA = {"palette": tuple(GRADES), "line": tuple(LINES)}
STRATA |= {"shading": ("flat", "cel", "soft"), "yaw": tuple(TURNS)}

# ---- who is in the data set ----------------------------------------------------------------------


def cast(characters=CHARACTERS, seed=0):
    """-> list of dicts: a name and one value per attribute. Every value is shared by several characters."""
    rng = np.random.default_rng([seed, 48])
    ends = ("ka", "ko", "mi", "na", "ne", "ri")
    starts = ("aki", "ao", "haru", "hina", "mi", "natsu", "sora", "yuki")
    numbers = range(1 + characters // 48)
    names = [start + end + str(i or "") for i, end, start in product(numbers, ends, starts)]
    while True:
        columns = [deal(values, characters, rng) for values in ATTRIBUTES.values()]
        people = list(zip(*columns, strict=True))
        if all(sum(map(str.__ne__, p, q)) >= 3 for p, q in combinations(people, 2)):
            break
    people = [dict(zip(ATTRIBUTES, values, strict=True)) for values in people]
    return [{"name": name} | person for name, person in zip(names, people, strict=False)]


def deal(values, characters, rng):
    """-> a value for each character, dealt out evenly."""
    deck = rng.permutation(np.repeat(values, [4 if v.startswith("no_") else 1 for v in values]))
    return rng.permutation(np.resize(deck[: max(2, characters // 2)], characters)).tolist()


def plan(n=COUNT, characters=CHARACTERS, seed=0, tail=0.0):
    """-> n items {key, label, seed, who} for draw(). Class sizes follow rank^-tail, at least 5 where n allows."""
    floor, weights = min(5, n // characters), np.arange(1, characters + 1) ** -float(tail)
    sizes = (floor + (n - floor * characters) * weights / weights.sum()).astype(int)
    sizes[: n - sizes.sum()] += 1  # what rounding down has left over
    people, labels = cast(characters, seed), np.repeat(np.arange(characters), sizes).tolist()
    return [
        {"key": f"{people[k]['name']}/{i:06d}", "label": k, "seed": (seed, i), "who": people[k]}
        for i, k in enumerate(labels)
    ]


# ---- colours: (hue in degrees, saturation, value) ------------------------------------------------


def towards(hue, target, step):
    """Turn a hue by at most `step` degrees towards a target hue, the short way round."""
    return hue + np.clip((target - hue + 180) % 360 - 180, -step, step)


def shade(colour, k=1.0):
    """A shadow tone: darker, a little more saturated, turned towards violet."""
    h, s, v = colour
    hue = towards(h, 262, 16 * k) if s > 0.1 else 255
    return hue, min(1, s * (1 + 0.22 * k) + 0.05 * k), v * (1 - 0.2 * k)


def light(colour, k=1.0):
    """A lit tone: lighter, paler, turned towards yellow."""
    h, s, v = colour
    return towards(h, 52, 12 * k), s * (1 - 0.35 * k), v + (1 - v) * 0.55 * k


def ink(colour):
    """The line art around a local colour: that colour, much darker, never pure black."""
    h, s, v = shade(colour)
    return towards(h, 262, 14), min(1, s * 1.1 + 0.18), v * 0.46


def rgb(colour, palette):
    """-> (r, g, b) of 0..255, as this palette sees the colour."""
    (h, s, v), (sat, scale, lift) = colour, GRADES[palette]
    s, v = min(1, max(0, s * sat)), min(1, max(0, v * scale + lift))
    return tuple(round(255 * u) for u in colorsys.hsv_to_rgb(h / 360 % 1, s, v))


def jitter(colour, rng, hue=7, sat=0.18, val=0.09):
    """The same colour on another day."""
    h, s, v = colour
    h += rng.normal(0, hue)
    return h, min(1, s * rng.lognormal(0, sat)), min(1, v * rng.lognormal(0, val))


# ---- curves: from lists of (x, y) or (x, y, is it a sharp corner) to arrays (n, 2) ---------------


def path(text):
    """ "20,-76! 34,-105" -> [(0.20, -0.76, True), (0.34, -1.05, False)]; for o20,10,5 see the wardrobe."""
    points = []
    for word in text.split():
        x, y, *radii = (float(number) / 100 for number in word.strip("o!").split(","))
        if radii:
            r, ry, lean = radii + [radii[0], 0][len(radii) - 1 :]  # a circle without lean
            turns = [(np.cos(t), np.sin(t)) for t in np.arange(8) * np.pi / 4]
            points += [(x + r * u, y + ry * v - lean * u, False) for u, v in turns]
        else:
            points.append((x, y, word[-1] == "!"))
    return points


def mirror(points, side=-1):
    """The points on the other side of the head, if side is -1."""
    return [(q[0] * side, *q[1:]) for q in points]


def both(half):
    """A right half, listed from top to bottom -> the whole symmetric outline."""
    return [*half, *mirror(half[::-1])]


def spline(points, closed=False, n=8):
    """A Catmull-Rom curve through the points, n samples per segment."""
    twice = []  # a corner is a doubled point: nothing lies between
    for q in points:
        twice += [q[:2]] * (2 if len(q) > 2 and q[2] else 1)
    p = np.array(twice, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    keep = np.abs(c - b).sum(1) > 1e-9
    a, b, c, d = (q[keep][:, None] for q in (a, b, c, d))
    t = (np.arange(n) / n)[None, :, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.reshape(-1, 2), p[-2:-1]])


def tufts(row):
    """A row of hair tips: (m, 2) valley, tip, valley, ... The legs bulge, so strands look like leaves."""
    points = [(*row[0], 1)]
    for i, (a, b) in enumerate(zip(row[:-1], row[1:], strict=True)):
        knee = a + (b - a) * (0.2, 0.56) if i % 2 == 0 else b + (a - b) * (0.2, 0.56)
        points += [knee, (*b, 1)]
    return spline(points)


def brush(curve, width, heavy=0.5):
    """A tapered stroke along a curve -> its polygon; `heavy` is where along the curve it is thickest."""
    profile = np.sin(np.pi * np.linspace(0, 1, len(curve)) ** (np.log(0.5) / np.log(heavy))) ** 0.8
    along = np.gradient(curve, axis=0)
    across = along[:, ::-1] * (-1, 1) / (np.hypot(*along.T)[:, None] + 1e-9)
    half = across * (width / 2 * profile)[:, None]
    return np.concatenate([curve + half, (curve - half)[::-1]])


def oval(x, y, rx, ry, n=28):
    """An ellipse around (x, y)."""
    t = np.arange(n) * (2 * np.pi / n)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


CROWN = spline(path("-57,0 -61,-28 -53,-58 -31,-79 0,-87 31,-79 53,-58 61,-28 57,0"))
HEART = spline(both(path("0,-24! 29,-47 52,-16 0,52!")), closed=True)
STAR = spline(both(path("0,-62! 16,-23! 59,-19! 27,9! 36,50! 0,28!")), closed=True)
SPARKLE = spline(both(path("0,-76! 16,-16! 76,0! 16,16! 0,76!")), closed=True)

# ---- from head units to pixels -------------------------------------------------------------------


class Canvas:
    """A picture and a stencil, side by side. The stencil says which shape owns each pixel, so that it serves
    both to clip later shapes and as the parts map."""

    def __init__(self, backdrop, s):
        self.image, self.stencil = backdrop, Image.new("L", backdrop.size)
        self.on_image, self.on_stencil = ImageDraw.Draw(self.image), ImageDraw.Draw(self.stencil)
        self.owner = [0]  # shape id -> part id; shape 0 is the background
        self.scale, self.centre = s.scale * backdrop.width, s.centre * backdrop.width
        self.palette, self.shading = s.palette, s.shading
        self.light_from, self.line = s.sun, LINES[s.line]

    def pose(self, yaw, nod, roll, flip=1):
        """Draw through this pose from now on: turned, nodding, tilted (radians), mirrored if flip is -1."""
        self.yaw, self.nod, self.flip = yaw, nod, flip
        self.tilt = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
        self.sun = self.light_from * flip  # -1 (left) or 1 (right), as the posed head sees it

    def pixels(self, points, depth):
        """The one transform: (n, 2) head units -> (n, 2) pixels. A head is a bump: its middle is near."""
        x, y = np.asarray(points, float)[:, :2].T
        bump = 0.38 * depth * np.exp(-2 * (x**2 + y**2))
        p = np.stack([x * np.cos(self.yaw) + bump * np.sin(self.yaw), y + bump * self.nod - 0.6], 1)
        tilted = p @ self.tilt + (0, 0.6)  # at the chin
        return tilted * self.scale * (self.flip, 1) + self.centre

    def fill(self, points, colour, part=None, depth=1.0, inside=None, alpha=1.0, soft=0):
        """Fill a polygon; `colour` may be a (top, bottom) pair. -> shape id. Without `part` the stencil stays
        as it is; `inside` clips to those shape ids; `soft` blurs the edge, in final pixels."""
        pixels, shape = self.pixels(points, depth), len(self.owner) if part else None
        if part:
            self.owner.append(PARTS.index(part))
            self.on_stencil.polygon(pixels.ravel().tolist(), fill=shape)
        ramp = isinstance(colour[0], tuple)
        if inside is None and alpha == 1 and not ramp:
            self.on_image.polygon(pixels.ravel().tolist(), fill=rgb(colour, self.palette))
            return shape
        # The slow way to fill: through a mask, which is only as large as the polygon.
        low = np.maximum(pixels.min(0) - SS * (1 + 2 * soft), 0).astype(int)
        high = np.minimum(pixels.max(0) + SS * (1 + 2 * soft), self.image.size).astype(int)
        if (high <= low).any():
            return shape
        box, mask = (*low.tolist(), *high.tolist()), Image.new("L", (high - low).tolist())
        ImageDraw.Draw(mask).polygon((pixels - low).ravel().tolist(), fill=round(255 * alpha))
        if soft:  # blur where it is cheap: at the final resolution
            mask = blurred(mask, SS, soft)
        if inside is not None:
            allowed = [255 * (i in inside) for i in range(256)]
            mask = ImageChops.multiply(mask, self.stencil.crop(box).point(allowed))
        tone = gradient(*colour, self.palette, mask.size) if ramp else rgb(colour, self.palette)
        self.image.paste(tone, box, mask)
        return shape

    def outline(self, points, colour, width, part=None, depth=1.0):
        """Line art around a polygon, drawn as with a slanted nib: twice, a little apart."""
        pixels, nib = self.pixels(points, depth), width * self.scale
        self.owner += [PARTS.index(part)] if part else []
        wide = max(2, round(0.65 * nib))
        for d in (-0.25 * nib, 0.25 * nib):
            loop = (np.concatenate([pixels, pixels[:2]]) + (0.6 * d, self.sun * d)).ravel().tolist()
            self.on_image.line(loop, fill=rgb(colour, self.palette), width=wide)
            if part:
                self.on_stencil.line(loop, fill=len(self.owner) - 1, width=wide)

    def shape(self, points, colour, part, depth=1.0, shift=0.06, tips=None):
        """The workhorse, a cel-shaded and outlined shape: filled with its shadow tone, and then a copy of it,
        moved towards the sun and clipped to the shape, with the lit tone. A hard-edged shadow is left."""
        lit = (colour, tips) if tips else colour
        dark = (shade(colour), shade(tips)) if tips else shade(colour)
        flat = self.shading == "flat" or not shift or not part
        shape = self.fill(points, lit if flat else dark, part, depth)
        if not flat:
            moved, soft = points + (self.sun * shift, -0.6 * shift), 2 * (self.shading == "soft")
            self.fill(moved, lit, None, depth, inside=[shape], soft=soft)
        if shift:
            self.outline(points, self.line[1] or ink(colour), self.line[0], None, depth)
        return shape


def gradient(top, bottom, palette, size):
    """A vertical gradient between two colours -> an image of this size."""
    top, bottom = (np.array(rgb(x, palette), float) for x in (top, bottom))
    column = top + np.linspace(0, 1, size[1])[:, None, None] * (bottom - top)
    return Image.fromarray(np.uint8(np.rint(column))).resize(size, Image.NEAREST)


def blurred(image, factor, radius):
    """The image, blurred where it is cheap: at a resolution that is lower by this factor."""
    small = image.reduce(factor).filter(ImageFilter.GaussianBlur(radius))
    return small.resize(image.size, Image.BILINEAR)


# ---- the wardrobe: drawings made of pieces -------------------------------------------------------

# A drawing is its names and its pieces, back to front, between slashes. A piece is a tone (see `tones`), how
# to draw it, and its paths, between bars. How: one, pair (left and right) or both (a half, to be mirrored);
# then any of line or thick (tapered strokes), rim (an outline only), flat (no shading, no lines), clip (flat,
# inside what was drawn before). In a path, o20,10,5 is an oval around (0.20, 0.10) of radius 0.05; its other
# radius and its lean may follow. =x are the pieces of x.
WARDROBE = """
nape, braid, side_ponytail, low_twintails: back both 0,-84 42,-73 62,-36 63,8 55,36! 46,54! 38,42! 23,58! 0,46
bob_cut: back both 0,-87 47,-75 70,-30 75,16 69,48 49,68! 44,60 30,65! 20,58
long_hair, hime_cut: back both 0,-86 46,-75 67,-30 71,30 77,90 82,150 30,160
    / strand pair line 61,10 65,60 70,120 | 52,30 55,80 57,130
wavy_hair: back both 0,-89 49,-77 74,-34 70,2 88,28 78,56 98,84 86,110 102,140 30,160
    / strand pair line 62,0 74,30 63,58 80,88 70,120 | 54,20 60,45 53,70 66,100
twintails: =nape / hair pair 48,-60 68,-76 98,-54 112,0 108,50 100,106! 92,74 82,96! 80,50 70,64! 70,20 72,-15
    54,-42 / strand pair line 60,-56 86,-42 97,10 95,60 | 58,-50 78,-22 84,20 83,50
    / acc pair 49,-66 58,-70 64,-48 54,-42
ponytail: hair one 5,-74 18,-104 54,-112 94,-80 108,-20 104,35 96,88! 87,48 76,72! 74,20 70,-30 48,-62
    / strand one line 28,-86 70,-80 91,-30 94,32 | 30,-79 62,-66 80,-20 83,32
    / acc one 10,-84 22,-96 38,-80 26,-68 / =nape
messy_hair: hair one -6,-90 2,-106! 16,-93 28,-90 46,-100! 46,-84 58,-70 80,-72! 67,-52 66,-38 88,-24! 70,-14
    68,2 86,24! 65,22 62,34 66,58! 50,45 40,46 34,66! 20,52 0,50 -14,66! -26,50 -40,44 -58,62! -58,38 -64,22
    -84,30! -70,6 -70,-8 -90,-16! -70,-30 -66,-44 -84,-60! -62,-66 -52,-80 -58,-98! -38,-88
drill_hair: =nape / hair pair o74,108,5,3,6 | o74,93,10,6,6 | o74,78,14,8,6 | o74,63,17,10,6 | o74,48,19,11,6
    | o74,33,21,13,6 | o74,18,22,13,6 | o74,3,22,13,6 | o74,-12,20,12,6
double_bun: =nape / hair pair 26,-72 24,-98 44,-112 64,-102 68,-80 54,-62 / strand pair line 34,-76 34,-94
    47,-101 58,-92 55,-80 46,-80 / acc pair 24,-76! 32,-84 50,-76 60,-62! 54,-56 36,-66
short locks, twintails locks, drill_hair locks: hair pair 48,-50 60,-20 61,15 53,44! 48,25 43,-8
bob_cut locks: hair pair 48,-50 61,-20 64,18 56,54! 51,36 43,-5
long_hair locks: hair pair 48,-50 61,-15 64,40 61,112! 51,60 43,0 / strand pair line 52,0 56,40 57,85
hime_cut locks: hair pair 44,-40 61,-30 64,0 64,40! 43,43! 42,0 / strand pair line 53,-10 54,15 54,38
wavy_hair locks: hair pair 48,-50 64,-15 58,18 72,50 60,82 68,112! 48,84 55,50 45,22 44,0
ponytail locks: hair pair 48,-50 60,-20 61,15 55,60! 48,30 43,-8
messy_hair locks: hair pair 48,-50 61,-20 66,2 74,26! 59,20 52,40! 47,14 43,-10
double_bun locks: hair pair 48,-50 60,-20 62,20 58,72! 51,40 43,-8
braid locks: =short locks / hair one 56,130! 44,114 50,98 62,98 68,114 | o51,90,9,8,-5 | o61,82,9,8,5 |
    o51,74,10,9,-5 | o61,66,10,9,5 | o51,58,10,9,-5 | o60,50,10,9,5 | o51,42,10,9,-5 | o59,34,10,9,5 |
    o52,26,10,9,-5 / acc one 48,95 64,95 64,104 48,104
side_ponytail locks: =short locks / hair one 52,14 72,12 96,40 100,90 84,138! 80,104 66,126! 64,80 56,44
    / strand one line 62,26 82,50 86,90 / acc one 50,12 62,6 69,22 58,36 49,28
low_twintails locks: =short locks / hair pair 50,44 62,40 78,72 74,132! 64,104 54,128! 50,90 46,62
    / strand pair line 57,52 65,78 65,104 / acc pair 46,42 63,36 65,48 49,53
ahoge: hair one -5,-84! -10,-102 5,-116 26,-104! 8,-108 -1,-99 4,-84!
double_ahoge: hair one 0,-84! 2,-102 17,-113 34,-99! 18,-105 9,-100 7,-84!
    | 2,-84! -8,-100 -22,-107 -34,-92! -21,-99 -13,-96 -6,-84!
hair_bow behind: acc one 36,-76 24,-98 4,-102! 2,-70! 20,-66 | 36,-76 56,-92 74,-84! 68,-52! 50,-58 | 28,-84
    42,-86 46,-70 32,-66
cat_ears behind: fur pair 18,-76! 30,-104 52,-122! 60,-92 58,-50!
    / fluff pair clip 28,-76! 38,-98 50,-110! 54,-88 53,-60!
fox_ears behind: fur pair 10,-76! 28,-112 62,-130! 70,-92 62,-44! / dark pair clip 40,-114! 62,-134! 70,-104!
    54,-112 / pale pair clip 22,-72! 36,-98 54,-112! 60,-84 56,-56!
rabbit_ears behind: fur pair 10,-76! 8,-112 18,-146 34,-150 42,-118 38,-68!
    / fluff pair clip 17,-76! 16,-112 23,-136 31,-136 34,-112 31,-70!
horns behind: bone pair 26,-70! 30,-98 58,-116! 52,-96 50,-56!
    / strand pair line 29,-84 40,-82 52,-74 | 33,-96 42,-94 52,-88
halo behind: gold both 0,-114 28,-111 42,-103 28,-95 0,-92! 0,-98! 22,-99 30,-103 22,-107 0,-109!
headphones: dark both 0,-98 46,-85 67,-40 66,-8! 60,-8! 58,-40 38,-77 0,-89
    / acc pair 54,-18 67,-20 76,4 67,30 54,28 49,5 / pale pair clip o66,5,7,13
hairclip: acc one 22,-38! 27,-42! 47,-22! 42,-18! | 22,-22! 42,-42! 47,-38! 27,-18!
hair_flower: acc one o46,-63,10 | o58,-54,10 | o54,-39,10 | o38,-39,10 | o34,-54,10 / gold one o46,-50,7
hairband: acc both 0,-84 32,-77 56,-52 62,-26! 57,-20! 50,-44 28,-64 0,-70
beret: acc one -58,-60 -72,-84 -40,-112 16,-112 54,-94 60,-68 30,-74 -20,-70 | o-12,-116,4,8
witch_hat: dark one -92,-52 -60,-70 0,-74 60,-70 92,-52 60,-46 0,-56 -60,-46 | -48,-66! -30,-106 4,-150!
    20,-108 48,-66! 0,-56 / acc one clip -52,-82 0,-76 52,-82 52,-64! 0,-58 -52,-64!
round_glasses: frame pair rim o25,15,20 / frame one line -8,11 0,8 8,11 / frame pair line 43,8 56,6
square_glasses: frame pair rim 6,0! 45,0! 42,27 9,27 / frame one line -8,11 0,8 8,11 | 43,8 56,6 | -43,8 -56,6
ears: skin pair o50,12,7,11; face: skin both 0,-70 34,-60 49,-30 49,0 44,25 28,47 8,59 0,61
nose: mark one line 1,27 3,30 0,31; mole_under_eye: mark one flat o31,36,2
freckles: mark pair flat o20,33,1.4 | o26,36,1.4 | o32,33,1.4 | o38,31,1.4
star_tattoo: tattoo one flat -32,30! -30,34! -25,35! -29,38! -28,43! -32,40! -36,43! -35,38! -39,35! -34,34!
whisker_markings: mark pair line 25,32 33,32 42,30 | 25,38 33,38 42,36 | 25,44 33,44 42,42
bandaid: dough one -42,29! -38,24! -21,36! -25,41! / pale one clip -35,31! -32,27! -27,31! -30,35!
teeth and tongue: teeth one clip -12,36! 12,36! 9,42! -9,42! / tongue one clip o0,53,9,6
smile mouth: lips one line -10,40 -5,43 0,44 5,43 10,40; flat mouth: lips one line -6,43 0,42 6,43
frown mouth: lips one line -8,45 0,42 8,45; wavy mouth: lips one line -8,44 -4,42 0,43 4,42 8,44
cat mouth: lips one line -11,40 -5,44 0,40! 5,44 11,40; pout mouth: mouth one -4,42! 0,41 4,42! 3,46 -3,46
open mouth: mouth one -11,39! 0,40 11,39! 7,48 0,51 -7,48 / =teeth and tongue
laugh mouth: mouth one -14,38! 0,40 14,38! 10,49 0,54 -10,49 / =teeth and tongue
o mouth: mouth one 0,39 5,43 0,49 -5,43 / tongue one clip o0,53,9,6
laughing eye: lash one thick 9,18 17,11 26,8 34,11 42,16 / lash one line 37,11 42,12
sleeping eye: lash one thick 9,16 17,22 26,25 34,22 42,15 / lash one line 37,20 43,24
torso: cloth both 12,72 21,79 50,87 78,102 95,150 50,180 / skin both 12,38 13,66 22,82 10,104
    / shadow both clip 0,-57 34,-47 49,-17 49,13 44,38 28,60 8,72 0,74
bow: acc pair 0,108 18,98 24,106 22,120 14,122 / acc one -5,103 5,103 6,114 -6,114
sailor_collar: skin one flat -17,70! 17,70! 0,108! / trim pair 13,70! 30,77 47,90 48,108! 20,116 -1,110!
    / shirt pair clip 44,88! 45,105! 12,110! 12,106! 41,102! 40,86! / =bow
hoodie: cloth pair 13,70! 32,66 54,82 52,98 28,110 0,104! / shirt pair line 13,104 15,118 14,136
    / trim pair flat 13,72! 24,74 38,88 29,98 0,105! 0,98! 21,93 27,86!
necktie: shirt one flat -18,72! 18,72! 26,90! 0,150! -26,90! / acc one -6,90! 6,90! 4,99! 10,140! -10,140!
    -4,99! / shirt pair 12,68! 20,72! 30,84! 18,104! 0,88! / cloth pair 26,78! 38,84! 40,104! 16,150! 26,104!
kimono: shirt pair 12,68! 22,74! 4,112! -10,110! / trim one -15,68! -27,74! 8,140! 30,140! | 15,68! 27,74!
    -8,140! -30,140!
frills: shirt pair o35,84,11 | o36,95,11 | o30,104,11 | o19,109,11 | o7,111,11
    / trim both 0,70 14,68 32,79 37,92 24,105 0,110 / =bow
turtleneck: trim both 0,64 17,63 20,76 28,88 22,99 0,105 / strand pair line 5,66 6,78 7,92 | 12,66 14,78 15,91
hand: cuff one 40,108! 76,108! 80,150! 36,150! / hand one 46,110! 42,86 47,74 44,46 49,40 54,45 58,69! 64,42
    69,38 74,43 69,72 77,80 74,110! / mark one line 48,80 56,84 66,80
doughnut: dough one o24,62,21 / icing one flat 4,62 8,46 24,42 40,46 44,62 39,68 33,66 28,73 22,69 14,74 9,67
    / dark one flat o24,60,6
popsicle: dough one 22,84 28,84 27,116 23,116 / icing one 12,50 16,40 34,40 38,50 38,86! 12,86!
    / pale one flat 17,50 20,47 21,72 18,74
lollipop: pale one 23,60! 26,60! 27,118! 24,118! / icing one o24,58,16
    / pale one line 24,58 30,54 26,48 16,54 18,66 30,68
onigiri: pale one 24,42 34,50 46,74 40,82 8,82 2,74 14,50 / dark one flat 15,70! 33,70! 33,83! 15,83!
sweat: water one 44,-16! 51,0 45,7 38,0
tears: water pair 37,25! 43,36 38,42 32,36 / water pair flat 16,29 25,31 24,35 18,34
vein: red one line 30,-46 35,-40 29,-35 | 50,-46 44,-40 50,-35 | 36,-54 40,-48 45,-54 | 36,-28 40,-34 45,-28
speech_bubble: bubble one 50,-112 80,-108 92,-88 80,-68 62,-66 48,-54! 50,-68 34,-76 32,-98
    / dots one flat o50,-88,3 | o62,-88,3 | o74,-88,3
blunt_bangs: hair one 57,0 49,6 42,-14 36,-3 26,-12 17,-2 7,-12 -3,-2 -13,-12 -24,-3 -42,-14 -49,6 -57,0
choppy_bangs: hair one 57,0 47,10 37,-22 21,2 14,-30 1,6 -10,-28 -25,3 -34,-20 -47,10 -57,0
swept_bangs: hair one 57,0 50,12 40,-42 3,-2 7,-22 -22,2 -17,-17 -42,7 -37,-10 -54,16 -57,0
parted_bangs: hair one 57,0 48,14 40,-12 25,0 22,-20 10,-6 3,-54 -9,-5 -20,-20 -27,0 -40,-12 -48,14 -57,0
curtain_bangs: hair one 57,5 47,30 44,0 37,12 0,-58 -37,12 -44,0 -47,30 -57,5
hair_over_one_eye: hair one 57,0 48,12 40,-20 25,-2 24,-52 -10,10 -8,-2 -26,36 -24,16 -43,42 -57,5
"""


PIECE = r"\s*([^\d]*?)\s*((?:o?-?\d.*)?)"  # words, and paths from the first number on


def drawings(text):
    """The wardrobe's text -> {name: [(tone, how, points), ...]}."""
    pieces_of = {}
    for entry in re.split(r"\n+(?=\w)|; ", text.strip()):
        names, body = entry.split(": ")
        pieces = []
        for piece in body.split("/"):
            words, paths = re.fullmatch(PIECE, piece, re.DOTALL).groups()
            known, (tone, *how) = pieces_of.get(words[1:]), words.split()  # =x are the pieces of x
            pieces += known or [(tone, how, path(points)) for points in paths.split("|")]
        pieces_of |= dict.fromkeys(names.split(", "), pieces)
    return pieces_of


DRAWINGS = drawings(WARDROBE)


def draw_pieces(c, s, name, depth=0.25, at=(0, 0), sides=(1, -1)):
    """Draw the drawing of this name, if there is one, shifted by `at`. c is the Canvas, s the scene."""
    shapes = []
    for tone, how, points in DRAWINGS.get(name, ()):
        (colour, tips, part), points = s.tones[tone], both(points) if "both" in how else points
        for side in sides if "pair" in how else sides[:1]:
            stroke = {"line": 0.024, "thick": 0.06}.get(how[-1])
            curve = spline(mirror(points, side), closed=not stroke) + at
            if stroke:
                c.fill(brush(curve, stroke, 0.45), colour, part, depth)
            elif "rim" in how:
                c.outline(curve, colour, 0.028, part, depth)
            elif "clip" in how:
                c.fill(curve, colour, None, depth, inside=shapes[-2:])
            else:
                shift = 0 if "flat" in how else 0.06
                shapes.append(c.shape(curve, colour, part, depth, shift, tips))


def tones(who, rng):
    """-> {tone: (colour, colour at the tips or None, part or None)}: this picture's colours."""
    hair, skin = jitter(HAIR[who["hair_colour"]], rng), jitter(SKIN, rng, 3, 0.15, 0.03)
    tips = jitter(light(hair, rng.choice([0, 0.5])), rng, 12, 0.1, 0.02)
    cloth = jitter(CLOTH[pick(rng, CLOTH, who["clothes_colour"], 0.1)], rng)
    trim = pick(rng, (WHITE, light(cloth), shade(cloth, 1.6)))
    at_tips = {"hair": tips, "back": shade(tips, 0.8), "fur": tips}
    rows = [
        *PAINTS,
        ("hair", "hair", hair),
        ("back", "hair", shade(hair, 0.8)),
        ("skin", "face", skin),
        ("lash", "eyes", ink(shade(hair))),
        ("lips", "mouth", shade(MOUTH, 2.6)),
        ("mouth", "mouth", shade(MOUTH, 0.6)),
        ("cloth", "clothes", cloth),
        ("trim", "clothes", trim),
        ("fur", "accessory", hair),
        ("hand", "accessory", skin),
        ("cuff", "accessory", cloth),
        ("bone", "accessory", pick(rng, ((30, 0.25, 0.85), (350, 0.6, 0.5), INK))),
        ("acc", "accessory", jitter(pick(rng, TRINKET), rng)),
        ("icing", "accessory", jitter(pick(rng, TRINKET), rng)),
        ("frame", "accessory", pick(rng, (INK, (0, 0.6, 0.5), (230, 0.5, 0.5)))),
        ("strand", None, ink(hair)),
        ("mark", None, shade(skin, 3)),
        ("shadow", None, shade(skin, 1.3)),
    ]
    return {name: (colour, at_tips.get(name), part) for name, part, colour in rows}


# ---- the face and the fringe ---------------------------------------------------------------------


def draw_face(c, s):
    """Ears, the face itself, blush and a small nose."""
    draw_pieces(c, s, "ears", 0.3)
    draw_pieces(c, s, "face", 1)
    outline = spline(both(DRAWINGS["face"][0][2]), closed=True)
    c.face = c.pixels(outline, 1)  # from the forehead to the chin
    for side in (-1, 1)[: 2 * bool(s.blush)]:
        cheek, face = oval(side * 0.31, 0.32, 0.13, 0.065), len(c.owner) - 1
        c.fill(cheek, (354, 0.55, 1), alpha=0.27 * s.blush, inside=[face], soft=1.5)
    draw_pieces(c, s, "nose", 1, sides=(s.facing,))


def lids(shape, openness):
    """-> upper and lower lid curve in eye units, from the inner (-1) to the outer (+1) corner."""
    top = 0.5 if shape == "jitome" else 1.0
    arch = [(-0.66, -0.6), (-0.08, -0.98), (0.55, -0.84)]
    upper = [(-1, 0.22), *[(x, y * top) for x, y in arch], (1.0, -0.12)]
    lower = [(-1, 0.22), (-0.74, 0.72), (-0.25, 0.98), (0.38, 0.95), (0.82, 0.52), (1.0, -0.12)]
    return (
        spline([(x, 0.25 + (y - 0.25) * openness) for x, y in upper]),
        spline([(x, 0.25 + (y - 0.25) * min(1, 0.5 + openness / 2)) for x, y in lower]),
    )


def eye_place(s, side):
    """-> a function from eye units to head units, for the eye on this side: scaled, tilted, mirrored."""
    width, height, tilt = EYES[s.who["eye_shape"]]
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

    def place(points):
        scaled = np.asarray(points)[:, :2] * (width, height)
        return (scaled @ turn + (0.25, 0.12)) * (side, 1)

    return place


def draw_eye(c, s, side):
    """One eye, back to front: white, iris, the lid's shadow, lashes, crease."""
    openness, place = s.openness[side > 0], eye_place(s, side)
    if openness <= 0:
        return draw_pieces(c, s, "sleeping eye" if openness else "laughing eye", 1, sides=(side,))
    upper, lower = lids(s.who["eye_shape"], openness)
    white = c.fill(place(np.concatenate([upper, lower[::-1]])), (225, 0.03, 0.99), "eyes")
    draw_iris(c, s, place, side, white)
    shadow = place(np.concatenate([upper, upper[::-1] + (0, 0.34)]))
    c.fill(shadow, (262, 0.5, 0.3), inside=[white], alpha=0.28)
    draw_lashes(c, s, place, upper, lower)
    c.fill(brush(place(upper[8:-4] - (0, 0.32)), 0.018), shade(s.skin, 2.4))


def draw_iris(c, s, place, side, white):
    """Iris: a dark rim, a gradient from dark to light, a light crescent, pupil or pattern, two glints."""
    x, y, lit = s.gaze[0] * side - 0.04, 0.08 + s.gaze[1], side * c.sun

    def put(points, colour, alpha=1.0):
        c.fill(place(points), colour, inside=[white], alpha=alpha)

    put(oval(x, y, 0.72, 0.95), shade(s.iris, 2.9))
    put(oval(x, y + 0.02, 0.62, 0.85), (shade(s.iris, 2.2), light(s.iris, 0.35)))
    put(oval(x, y + 0.52, 0.42, 0.28), light(s.iris, 0.9), 0.75)
    dark, pale, plain = shade(s.iris, 3.6), light(s.iris, 1.2), oval(0, 0, 0.31, 0.41)
    patterns = {
        "plain_iris": [(plain, dark)],
        "ringed_iris": [(oval(0, 0, 0.48, 0.64), pale), (plain, dark)],
        "slit_pupils": [(oval(0, 0, 0.13, 0.72), dark)],
        "heart_iris": [(HEART, (345, 0.55, 1))],
        "star_iris": [(STAR, pale)],
        "cross_iris": [(SPARKLE, pale)],
    }
    for polygon, colour in patterns[s.who["iris"]]:
        put(polygon + (x, y + 0.04), colour)
    put(oval(x + 0.27 * lit, y - 0.44, 0.23, 0.25), WHITE)
    put(oval(x - 0.29 * lit, y + 0.44, 0.11, 0.12), WHITE)


def draw_lashes(c, s, place, upper, lower):
    """The upper lashes are one dark shape, heavier towards a flick at the outer corner; the lower a line."""
    t = np.linspace(0, 1, len(upper))[:, None]
    top = upper + (t - 0.35) * (0.14, 0) - (0, 1) * (0.07 + 0.24 * np.sin(np.pi * t**1.6) ** 0.7)
    c.fill(place(np.concatenate([upper, [(1.06, -0.1), (1.3, -0.5)], top[::-1]])), s.lash, "eyes")
    c.fill(place([(0.8, -0.75), (1.3, -0.95), (0.95, -0.45)]), s.lash, "eyes")
    c.fill(brush(place(lower[18:]), 0.024, 0.7), s.lash, "eyes")
    c.fill(brush(place(lower[6:20]), 0.012), s.lash)


def draw_brows(c, s):
    """The brows; drawn after the hair and half transparent, so that they show through the fringe."""
    lift, slant = s.brow
    arc = [
        (0.1, -0.18 + slant * 0.08),
        (0.22, -0.225),
        (0.33, -0.21 - slant * 0.03),
        (0.42, -0.16 - slant * 0.04),
    ]
    for side in (-1, 1):
        curve = spline(mirror([(x, y - lift) for x, y in arc], side))
        c.fill(brush(curve, 0.035, 0.35), shade(s.hair, 1.9), alpha=0.8)


def draw_front(c, s):
    """Crown and fringe: one shape, whose lower edge is a row of tips. First it casts a shadow on the face."""
    row = np.array(DRAWINGS[s.who["fringe"]][0][2])[:, :2]  # valley, tip, valley, tip, ..., valley
    row[1::2, 0] += s.sway
    points = np.concatenate([CROWN, tufts(row)])
    if c.shading != "flat":
        skin = [i for i, part in enumerate(c.owner) if PARTS[part] in ("face", "eyes")]
        c.fill(points + (-0.03 * c.sun, 0.065), (310, 0.5, 0.42), inside=skin, alpha=0.25)
    front = c.shape(points, s.hair, "hair", 0.9, 0.045, tips=s.tips)
    for x, y in row[2:-1:2]:  # a line from the crown into each valley
        strand = spline([(x * 0.45, -0.72 + 0.1 * abs(x)), (x * 0.8, y * 0.5 - 0.35), (x, y)])
        c.fill(brush(strand, 0.016), ink(s.hair), depth=0.9, alpha=0.8)
    if c.shading != "flat":
        draw_shine(c, s, front)


def draw_shine(c, s, front):
    """The ring of light around the crown: a band with jagged edges, broken where the hair parts."""
    for a, b in ((-0.46, -0.09), (-0.03, 0.19), (0.26, 0.47)):
        x, odd = np.linspace(a, b, 9) * c.sun, np.arange(9) % 2
        y, fade = -0.59 + 0.55 * x**2 + s.nod * 0.15, np.sin(np.linspace(0, np.pi, 9))
        upper = np.stack([x, y - 0.05 * odd * fade], 1)
        lower = np.stack([x, y + (0.03 + 0.1 * odd) * fade], 1)
        band = np.concatenate([upper, lower[::-1]])
        c.fill(band, light(s.hair, 1.1), inside=[front], alpha=0.85, depth=0.9)


# ---- what is behind ------------------------------------------------------------------------------


def box(x, y, width, height):
    """A rectangle."""
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)])


def pattern(kind, rng):
    """Yield (tone, polygon in the unit square), back to front."""
    if kind == "dotted_background":  # screen tone: dots which grow towards the bottom
        n = rng.integers(9, 15)
        for i, j in np.ndindex(n + 1, n + 1):
            r = (0.12 + 0.3 * j / n) / n
            yield "high", oval((i + j % 2 / 2) / n, j / n, r, r, n=12)
    elif kind == "striped_background":
        step, slant = 1 / rng.integers(4, 9), rng.uniform(-0.6, 0.6)
        for x in np.arange(-0.6, 1.6, step):
            stripe = [(x, 0), (x + step / 2, 0), (x + step / 2 + slant, 1), (x + slant, 1)]
            yield "high", np.array(stripe)
    elif kind == "sky":  # clouds over two hills
        for x, y in rng.uniform((-0.1, 0), (1, 0.45), (3, 2)):
            for i in range(4):
                yield "high", oval(x + 0.07 * i, y, *rng.uniform(0.05, 0.1, 2))
        for _ in range(2):
            yield "low", oval(rng.uniform(-0.4, 1.3), rng.uniform(1.4, 1.6), 1.1, 0.8, n=60)
    elif kind == "window":  # of four panes, above a floor
        x, y, w = rng.uniform((-0.1, 0.02, 0.4), (0.6, 0.15, 0.6))
        yield "low", box(x - 0.03, y - 0.03, w + 0.06, w * 1.3 + 0.06)
        for i, j in np.ndindex(2, 2):
            yield "high", box(x + i * (w / 2 + 0.01), y + j * 0.66 * w, w / 2 - 0.01, 0.62 * w)
        yield "low", box(0, 0.86, 1, 0.14)
    elif kind == "bokeh":  # lights out of focus; the blur comes later
        for x, y, r in rng.uniform((0, 0, 0.03), (1, 1, 0.12), (22, 3)):
            yield "high", oval(x, y, r, r)
    elif kind == "sunburst":  # rays from behind the head
        rays = rng.integers(9, 18)
        for t in (np.arange(rays) + rng.random()) * 2 * np.pi / rays:
            ends = [(np.cos(u), np.sin(u)) for u in (t, t + np.pi / rays)]
            yield "high", np.array([(0, 0), *ends]) + (0.5, 0.55)
    elif kind == "night_sky":  # stars and a moon
        for x, y, r in rng.uniform((0, 0, 0.01), (1, 1, 0.04), (30, 3)):
            yield "high", SPARKLE * r + (x, y)
        yield "high", oval(*rng.uniform((0.1, 0.08), (0.9, 0.25)), 0.09, 0.09)


def backdrop(kind, palette, rng, n):
    """-> an n x n image. Its colours know nothing of the character's."""
    hue, sat, value = rng.uniform((0, 0.05, 0.75), (360, 0.55, 1))
    if kind == "night_sky" or rng.random() < 0.15:
        hue, sat, value = rng.uniform((200, 0.4, 0.25), (300, 0.6, 0.5))
    top = bottom = (pick(rng, (28, 195, 210, 225, 340)) if kind == "sky" else hue, sat, value)
    if kind != "simple_background":
        hue = top[0] + rng.normal(0, 35)
        bottom = (hue, sat * rng.uniform(0.4, 0.9), min(1, value * rng.uniform(0.9, 1.3)))
    high = light(bottom, rng.uniform(0.5, 1.3))
    tone = {"high": high, "low": shade((top[0] - 40, sat, value * 0.85))}
    image = gradient(top, bottom, palette, (n, n))
    pen = ImageDraw.Draw(image)
    for name, polygon in pattern(kind, rng):
        pen.polygon((polygon * n).ravel().tolist(), fill=rgb(tone[name], palette))
    return blurred(image, 8, n / 500) if kind == "bokeh" else image


# ---- a picture -----------------------------------------------------------------------------------


def pick(rng, values, favourite=None, chance=0.0):
    """One of the values: the favourite with this chance, else any."""
    return favourite if rng.random() < chance else list(values)[rng.integers(len(values))]


def scene(who, rng):
    """Everything that varies from picture to picture."""
    s = SimpleNamespace(who=who, tones=tones(who, rng), iris=jitter(IRIS[who["eye_colour"]], rng))
    s.hair, s.tips, _ = s.tones["hair"]
    s.skin, s.lash = s.tones["skin"][0], s.tones["lash"][0]
    s.mood, s.blush = pick(rng, MOODS), pick(rng, (0, 1, 2))
    s.sway, *s.gaze = rng.normal(0, (0.02, 0.07, 0.07))
    s.openness, s.brow, s.mouth, sign = MOODS[s.mood]
    s.openness, s.sign = s.openness[:: rng.choice([-1, 1])], pick(rng, [sign], "", 0.5)
    s.held, s.at = pick(rng, ("hand", *FOOD), "", 0.9), rng.normal(0, 0.05, 2)
    s.bubble = rng.random() < 0.06
    s.outfit = pick(rng, ATTRIBUTES["outfit"], who["outfit"], 0.4)
    s.backdrop = pick(rng, ("gradient_background", *PATTERNS), "simple_background", 0.4)
    s.yaw, s.nod, s.roll = np.clip(rng.normal(0, (0.3, 0.15, 0.1)), -0.55, 0.55)
    s.scale, s.facing = rng.uniform(0.42, 0.60), np.sign(s.yaw)
    s.flip, s.sun = rng.choice([-1, 1], 2)
    low = 0.53 if who["accessory"] + " behind" in DRAWINGS else 0.49  # ears need room above
    s.centre = rng.normal((0.5, low), (0.08, 0.05))
    s.palette = str(rng.choice(list(GRADES), p=(0.36, 0.26, 0.16, 0.1, 0.07, 0.05)))
    s.line, s.shading = pick(rng, LINES), pick(rng, ("cel", "soft"), "flat", 0.1)
    return s


def draw_figure(c, s):
    """The figure, back to front."""
    who = s.who
    head, body = (s.yaw, s.nod, s.roll, s.flip), (s.yaw * 0.4 * s.flip, 0, s.roll * 0.2 * s.flip)
    c.pose(*head)
    draw_pieces(c, s, who["hair_style"], 0.15)
    draw_pieces(c, s, who["accessory"] + " behind", 0.15)
    c.pose(*body)
    draw_pieces(c, s, "torso")
    draw_pieces(c, s, s.outfit)
    c.pose(*head)
    draw_face(c, s)
    draw_pieces(c, s, s.mouth + " mouth", 1)
    draw_pieces(c, s, who["mark"], 1)
    for side in (-1, 1):
        draw_eye(c, s, side)
    draw_pieces(c, s, who["hair_style"] + " locks", 0.6)
    draw_front(c, s)
    draw_pieces(c, s, who["ahoge"])
    draw_brows(c, s)
    draw_pieces(c, s, s.sign, 1)
    draw_pieces(c, s, who["glasses"], 1.1)
    draw_pieces(c, s, who["accessory"], 0.4 if who["accessory"] in ("headphones", *HATS) else 0.8)
    c.pose(*body)
    draw_pieces(c, s, s.held, 1, s.at)
    draw_pieces(c, s, "speech_bubble" if s.bubble else "", 0, s.at)


def finish(c, s, rng, size):
    """Reduce the canvas to its final size, colours and alpha smoothly, part ids by picking; then light it."""
    parts = c.stencil.point((c.owner + [0] * 256)[:256])
    image = c.image.resize((size, size), Image.LANCZOS)
    if s.shading == "soft":  # a little bloom
        glow = image.filter(ImageFilter.GaussianBlur(size / 40))
        image = Image.blend(image, ImageChops.screen(image, glow), 0.18)
    lamp = rng.normal(1, 0.05, 3)  # coloured light
    fall = 1 + s.sun * np.linspace(-0.09, 0.09, size)[None, :, None]
    lit = np.asarray(image) * fall * (rng.uniform(0.85, 1.12) * lamp)
    return {
        "image": np.uint8(np.clip(lit + 0.5, 0, 255)),
        "fg": np.array(parts.point([0] + [255] * 255).reduce(SS)),
        "parts": np.array(parts)[SS // 2 :: SS, SS // 2 :: SS].copy(),
        "face": np.concatenate([c.face.min(0), c.face.max(0)]) / SS,
    }


def facts(s):
    """-> {tags: the words under which a picture board would file this picture, style: its STRATA}."""
    who = s.who
    own = ATTRIBUTES.keys() - {"outfit", "hair_colour", "eye_colour", "clothes_colour"}
    words = [who[key] for key in own]
    words += [who["hair_colour"] + "_hair", s.outfit, s.mood, s.backdrop, s.held, s.sign]
    words += ["closed_eyes"] if max(s.openness) <= 0 else [who["eye_colour"] + "_eyes"]
    also = {
        "glasses": who["glasses"] != "no_glasses",
        "hat": who["accessory"] in HATS,
        "blush": s.blush,
        "animal_ears": who["accessory"].endswith("_ears"),
        "speech_bubble": s.bubble,
        "occlusion": s.held,
        "food": s.held in FOOD,
        "monochrome": s.palette == "monochrome",
    }
    words += [word for word, holds in also.items() if holds]
    style = {"palette": s.palette, "line": s.line, "shading": s.shading}
    style["yaw"] = next(name for name, most in TURNS.items() if abs(s.yaw) <= most)
    tags = sorted({word for word in words if word and not word.startswith("no_")})
    return {"tags": tags, "style": style}


def describe(item):
    """What draw() will say of an item, without drawing it -> {tags, style}."""
    return facts(scene(item["who"], np.random.default_rng(item["seed"])))


def draw(item, size=128):
    """An item of a plan -> {image u8 (size, size, 3), fg u8 and parts u8 (size, size), face, tags, style}.

    face: x1, y1, x2, y2 of its outline in pixels, whatever hides it and whether it leaves the picture.
    """
    rng = np.random.default_rng(item["seed"])
    s = scene(item["who"], rng)
    c = Canvas(backdrop(s.backdrop, s.palette, rng, size * SS), s)
    draw_figure(c, s)
    return finish(c, s, rng, size) | facts(s)


def unseen(person, count, seed=0):
    """Items of one of the cast that no data set has, -> list for draw()."""
    return [{"seed": (seed + 1, i), "who": person} for i in range(count)]


def main():
    parser = Parser(__doc__, prog="ingest.toon")
    people = {person["name"]: person for person in cast()}
    add = parser.add_argument
    add("--who", choices=people, required=True, help="a character of the demo set")
    add("--out", help="the picture that is written, a PNG (default: WHO.png)")
    add("--size", type=between(8, 1024, int), default=128, help="side in pixels (default: 128)")
    add("--seed", type=at_least(0), default=0, help="another picture for each (default: 0)")
    args = parser.parse_args()
    out = args.out or f"{args.who}.png"
    reserve([out])
    picture = draw(unseen(people[args.who], 1, args.seed)[0], args.size)["image"]
    with atomic(out) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
    print(f"{out} written; next: python -m apps.recognize weights/toon-lora {out}")


if __name__ == "__main__":
    cli(main)
