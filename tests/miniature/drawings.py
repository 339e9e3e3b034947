"""The miniature's world: captioned 64x64 drawings in two styles, and a judge that reads captions and style off pixels.

A caption names a colour, a shape and a background ("a red circle on a blue background"). It never names the style:
"flat" drawings have uniform colours; "real" ones are lit from the upper left, shine, and throw a shadow. Training with
SRPO should move samples from flat to real while the captions stay right.
The judge is arithmetic on pixels: it shares nothing with the networks that it is used to judge.
"""

import numpy as np


SIZE = 64  # pixels per side
MAX_SEQUENCE_LENGTH = 16  # tokens; Wan does not mask the padding, so the miniature paints well at this length only
GUIDANCE_SCALE = 2.0
COLOURS = {
    "red": (204, 36, 36),
    "orange": (220, 124, 20),
    "yellow": (216, 200, 40),
    "green": (40, 152, 60),
    "blue": (44, 84, 208),
    "purple": (148, 48, 184),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {
    "white": (224, 224, 224),
    "gray": (128, 128, 128),
    "black": (28, 28, 28),
    "blue": COLOURS["blue"],
    "green": COLOURS["green"],
}
STYLES = ("flat", "real")

LIGHT = 0.35  # how much brighter the lit half of a "real" object is than the other, relative to the whole of it
FLAT_BELOW, REAL_FROM = 0.35, 0.5  # of LIGHT; between them a style is "unclear"
LEAST_AREA = 100  # pixels of an object, for the judge to see one at all
LOWEST_IOU = 0.7  # between an object and the best fitting shape, for the judge to name a shape at all

ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def captions():
    """All captions, in a fixed order; an object never has the colour of its background."""
    return [
        f"a {colour} {shape} on a {background} background"
        for colour in COLOURS
        for shape in SHAPES
        for background in BACKGROUNDS
        if colour != background
    ]


def parse_caption(caption):
    """`caption` -> (colour, shape, background)."""
    _, colour, shape, _, _, background, _ = caption.split()
    return colour, shape, background


def coverage(shape, row, column, radius):
    """How much of each pixel a shape of `radius` pixels centred on (row, column) covers: (64, 64) in [0, 1]."""
    y, x = ROWS - row, COLUMNS - column
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.89 * radius
    elif shape == "triangle":
        distance = np.maximum(0.894 * abs(x) - 0.447 * y - 0.492 * radius, y - 0.9 * radius)
    else:
        bars = np.minimum(np.maximum(abs(x), abs(y) / 0.36), np.maximum(abs(x) / 0.36, abs(y)))
        distance = (bars - 1.08 * radius) * 0.36
    return np.clip(0.5 - distance, 0, 1)


def draw(caption, style, rng):
    """A (64, 64, 3) uint8 drawing of `caption` in `style` ("flat" or "real"), its place and size drawn from `rng`."""
    colour, shape, background = parse_caption(caption)
    row, column = SIZE / 2 - 0.5 + rng.uniform(-4, 4, 2)
    radius = rng.uniform(16, 20)
    inside = coverage(shape, row, column, radius)[..., None]
    paint, ground = np.float32(COLOURS[colour]), np.float32(BACKGROUNDS[background])
    if style == "flat":
        picture = ground + inside * (paint - ground)
    else:
        slope = ((ROWS - row) + (COLUMNS - column))[..., None] / radius  # 0 at the centre, grows away from the light
        spot = (ROWS - row + 0.35 * radius) ** 2 + (COLUMNS - column + 0.35 * radius) ** 2
        shine = 70 * np.exp(-12 * spot / radius**2)[..., None]
        shadow = coverage(shape, row + 5, column + 5, radius)[..., None]
        ground = ground * (1 - 0.06 * slope) * (1 - 0.35 * shadow)
        picture = ground + inside * (paint * (1 - 0.25 * slope) + shine - ground)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def nearest(colour, palette):
    """Name of the palette's colour that is nearest to `colour` (3,)."""
    return min(palette, key=lambda name: np.linalg.norm(np.float32(palette[name]) - colour))


def shade_distance(image, colour, darkest, brightest):
    """Distance (64, 64) of each pixel to the nearest shade of `colour`, from `darkest` to `brightest` times it."""
    colour = np.float32(colour)
    shade = np.clip(image @ colour / (colour @ colour), darkest, brightest)
    return np.linalg.norm(image - shade[..., None] * colour, axis=-1)


def overlap(mask, shape):
    """Intersection over union of the (64, 64) boolean `mask` with a `shape` of its centre of gravity and its area."""
    template = centred_template(shape, ROWS[mask].mean(), COLUMNS[mask].mean(), mask.sum())
    return (mask & template).sum() / (mask | template).sum()


def nearest_shape(mask):
    """Name of the shape that fits the (64, 64) boolean `mask` best, or "unclear" where none fits."""
    if mask.sum() < LEAST_AREA:
        return "unclear"
    overlaps = {shape: overlap(mask, shape) for shape in SHAPES}
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= LOWEST_IOU else "unclear"


def centred_template(shape, row, column, area):
    """The boolean mask of `shape` whose centre of gravity is (row, column) and which covers `area` pixels."""
    unit = coverage(shape, SIZE / 2, SIZE / 2, 18) > 0.5
    radius = 18 * np.sqrt(area / unit.sum())
    drop = (ROWS[unit].mean() - SIZE / 2) * radius / 18  # a triangle's centre of gravity lies below its centre
    return coverage(shape, row - drop, column, radius) > 0.5


def light(image, mask):
    """How much brighter the upper left half of the `mask` is than the other: 0 if flat, around 1 if "real"."""
    brightness = image.mean(-1)
    towards_light = ROWS + COLUMNS < (ROWS + COLUMNS)[mask].mean()
    lit, dark = brightness[mask & towards_light].mean(), brightness[mask & ~towards_light].mean()
    return (lit - dark) / brightness[mask].mean() / LIGHT


def find_object(image):
    """
    Where the object is in a (64, 64, 3) float32 image: the names of its background and of its colour, its boolean mask
    (64, 64), and that of its core, without shadow and border. Colour and mask are None where nothing is painted.
    """
    sides = image.swapaxes(0, 1)
    border = np.concatenate([image[:4], image[-4:], sides[:4], sides[-4:]])
    background = nearest(np.median(border, (0, 1)), BACKGROUNDS)
    off_ground = shade_distance(image, BACKGROUNDS[background], 0.5, 1.2)
    core = off_ground > 0.6 * np.quantile(off_ground, 0.95)
    if core.sum() < LEAST_AREA:
        return background, None, None, core
    colour = nearest(np.median(image[core], 0), COLOURS)
    return background, colour, off_ground > shade_distance(image, COLOURS[colour], 0.5, 1.5), core


def judge_image(image):
    """What one (64, 64, 3) uint8 image shows: a dict of colour, shape, background and style."""
    image = image.astype(np.float32)
    background, colour, mask, core = find_object(image)
    if mask is None:
        return {"colour": "unclear", "shape": "unclear", "background": background, "style": "unclear"}
    found = {"colour": colour, "shape": nearest_shape(mask), "background": background}
    amount = light(image, core)
    return found | {"style": "flat" if amount < FLAT_BELOW else "real" if amount >= REAL_FROM else "unclear"}


def judge(images):
    """What each of the (N, 64, 64, 3) uint8 images shows: N dicts with keys colour, shape, background and style."""
    return [judge_image(image) for image in images]


def caption_accuracy(images, captions):
    """Share of the images whose colour, shape and background are all what the caption of the same position says."""
    seen = [(found["colour"], found["shape"], found["background"]) for found in judge(images)]
    return float(np.mean([found == parse_caption(caption) for found, caption in zip(seen, captions, strict=True)]))


def style_share(images, style):
    """Share of the images that the judge finds to be of `style` ("flat", "real" or "unclear")."""
    return float(np.mean([found["style"] == style for found in judge(images)]))


def shape_fidelity(images, captions):
    """
    How well the objects keep the shapes that their captions name, from 0 to 1: the mean intersection over union of
    what is painted with the ideal shape of the same place and size; 0 where nothing is painted. Fresh drawings reach
    0.97. It falls long before the judge stops to recognise a shape, and so shows early that training goes too far.
    """
    fits = []
    for image, caption in zip(images, captions, strict=True):
        mask = find_object(image.astype(np.float32))[2]
        painted = mask is not None and mask.sum() >= LEAST_AREA
        fits.append(overlap(mask, parse_caption(caption)[1]) if painted else 0.0)
    return float(np.mean(fits))
