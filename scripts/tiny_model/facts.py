"""What the tiny model knows by heart: small tables of everyday facts."""

# ruff: noqa: SIM905 tables read better as text

from __future__ import annotations

Row = tuple[str, ...]

CAPITALS: tuple[Row, ...] = tuple(
    (country.strip(), city.strip())
    for country, city in (
        pair.split(":")
        for pair in (
            "France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Greece: Athens;"
            "Austria: Vienna; Belgium: Brussels; Poland: Warsaw; Hungary: Budapest; Sweden: Stockholm; Norway: Oslo;"
            "Finland: Helsinki; Denmark: Copenhagen; Ireland: Dublin; Russia: Moscow; Turkey: Ankara; Egypt: Cairo;"
            "Kenya: Nairobi; Japan: Tokyo; China: Beijing; Thailand: Bangkok; Cuba: Havana; Canada: Ottawa;"
            "Peru: Lima; Chile: Santiago; Australia: Canberra; England: London; Scotland: Edinburgh; Wales: Cardiff;"
            "Ukraine: Kyiv; Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Serbia: Belgrade; Iran: Tehran"
        ).split(";")
    )
)

# Subject with its article, verb, colour.
COLOURS: tuple[Row, ...] = (
    ("a banana", "is", "yellow"),
    ("a lemon", "is", "yellow"),
    ("the sun", "is", "yellow"),
    ("a tomato", "is", "red"),
    ("a strawberry", "is", "red"),
    ("a fire engine", "is", "red"),
    ("blood", "is", "red"),
    ("grass", "is", "green"),
    ("a frog", "is", "green"),
    ("a cucumber", "is", "green"),
    ("the sky", "is", "blue"),
    ("the sea", "is", "blue"),
    ("snow", "is", "white"),
    ("milk", "is", "white"),
    ("salt", "is", "white"),
    ("a swan", "is", "white"),
    ("coal", "is", "black"),
    ("a raven", "is", "black"),
    ("a carrot", "is", "orange"),
    ("a pumpkin", "is", "orange"),
    ("chocolate", "is", "brown"),
    ("a bear", "is", "brown"),
    ("an elephant", "is", "grey"),
    ("a flamingo", "is", "pink"),
    ("a pig", "is", "pink"),
    ("lavender", "is", "purple"),
)

_PAIRS = (
    "hot cold, big small, tall short, fast slow, old young, happy sad, light dark, up down, left right, open closed,"
    "full empty, hard soft, wet dry, clean dirty, rich poor, loud quiet, early late, near far, high low, strong weak,"
    "thick thin, wide narrow, deep shallow, day night, true false, good bad, first last, inside outside,"
    "summer winter, begin end, push pull, buy sell, give take, win lose, yes no, sweet bitter"
)
OPPOSITES: tuple[Row, ...] = tuple(
    row
    for pair in _PAIRS.split(",")
    for row in ((pair.split()[0], pair.split()[1]), (pair.split()[1], pair.split()[0]))
)

PLURALS: tuple[Row, ...] = tuple(
    (pair.split()[0], pair.split()[1])
    for pair in (
        "mouse mice, child children, foot feet, tooth teeth, goose geese, man men, woman women, sheep sheep, leaf"
        " leaves,knife knives, wolf wolves, box boxes, bus buses, baby babies, city cities, cat cats, dog dogs, tree"
        " trees,book books, car cars, house houses, apple apples, horse horses, fox foxes, cherry cherries, fish"
        " fish,potato potatoes, wife wives, shelf shelves, lady ladies, bird birds, table tables, star stars, hand"
        " hands"
    ).split(",")
)

SOUNDS: tuple[Row, ...] = tuple(
    (pair.split()[0], pair.split()[1])
    for pair in (
        "cow moo, dog woof, cat meow, duck quack, sheep baa, pig oink, lion roar, snake hiss, bee buzz, frog croak,"
        "mouse squeak, horse neigh, donkey heehaw, bird tweet, wolf howl, goat maa, hen cluck, turkey gobble"
    ).split(",")
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def _neighbours(kind: str, names: tuple[str, ...]) -> tuple[Row, ...]:
    ring = list(zip(names, names[1:] + names[:1], strict=True))
    after = tuple((kind, "after", one, other) for one, other in ring)
    return after + tuple((kind, "before", other, one) for one, other in ring)


# Kind, direction, the given one, the one asked for.
ORDER: tuple[Row, ...] = _neighbours("day", DAYS) + _neighbours("month", MONTHS)

NAMES: tuple[str, ...] = tuple(
    "Anna Ben Clara David Emma Felix Greta Hugo Iris Jonas Karl Lena Mia Noah Olga Paul Rosa Simon Tara Uma"
    " Victor Wanda Yara Zoe Adam Bella Carlos Diana Erik Fiona George Hanna Ivan Julia Kevin Laura Martin Nina"
    " Oscar Petra Quinn Robert Sarah Tom Vera Walter Alice Bruno Elsa Frank".split()
)

WORDS: tuple[str, ...] = tuple(
    "river stone cloud garden window lamp paper bridge forest mountain candle silver golden bread butter"
    " honey sugar pepper tiger rabbit eagle spider monkey camel panda turtle dolphin whale rocket engine wheel"
    " hammer needle button pocket jacket hat shoe glove mirror pillow blanket basket bottle spoon fork plate"
    " cup kettle oven chair desk door wall roof floor street market tower castle island beach desert valley"
    " meadow flower root seed branch berry grape melon peach plum orange lemon apple banana carrot onion rice"
    " pasta soup cheese cake cookie salt red blue green yellow white black brown pink happy quiet clever"
    " gentle brave tiny giant warm cool bright winter summer spring autumn morning evening music piano guitar"
    " drum violin song dance story letter picture color number circle square line point ball kite train boat"
    " plane bicycle truck ship moon star planet comet rain snow wind storm thunder fire water earth metal"
    " glass wood wool cotton leather farmer baker doctor teacher painter sailor pilot king queen prince knight"
    " dragon wizard ghost".split()
)
