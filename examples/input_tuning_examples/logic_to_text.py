"""A logic-to-text task: query expressions such as `sort(releaseYear asc of MusicRecording())[1]` → English.

Inputs like these are rare in what a language model was pretrained on, and there input-tuning is meant to help.

    expression = operator ( property, selection )        selection = Entity() [filter condition [&& condition]]

Held out by composition: the test rows are of (operator, entity) pairs that no training row has, for example the
largest value of something among hotels. Each operator, entity, property and kind of selection is seen in training.
Validation rows are new rows of the training pairs. Everything follows from the seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Entity:
    """A type of thing with its properties.

    Args:
        name: as expressions write it.
        one, many: as sentences write it.
        numbers: property → (phrase, smallest value, largest value, step).
        texts: property → (sentence pattern, values).
    """

    name: str
    one: str
    many: str
    numbers: dict[str, tuple[str, int, int, int]]
    texts: dict[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Operator:
    """An expression around a selection, and its sentence.

    Patterns know {selection}, {p} and {q} (properties), {n}; {one} and {many} (the entity with its conditions),
    {phrase} and {q_phrase} (the properties in words).
    """

    name: str
    expression: str
    sentence: str


PEOPLE = ("Ana Silva", "Omar Haddad", "Lena Fischer", "Yuki Tanaka", "Grace Okafor", "Ivan Petrov")
LANGUAGES = ("French", "Hindi", "Polish", "Swahili", "Korean")
CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Lima", "Toronto")

ENTITIES = (
    Entity(
        "MusicRecording",
        "song",
        "songs",
        {"releaseYear": ("release year", 1960, 2020, 5), "playCount": ("number of plays", 100, 900, 100)},
        {"byArtist": ("by {}", PEOPLE), "inLanguage": ("in {}", LANGUAGES)},
    ),
    Entity(
        "Movie",
        "movie",
        "movies",
        {"runtimeMinutes": ("running time", 80, 180, 10), "ratingValue": ("rating", 1, 9, 1)},
        {"directedBy": ("directed by {}", PEOPLE), "inLanguage": ("in {}", LANGUAGES)},
    ),
    Entity(
        "Book",
        "book",
        "books",
        {"numberOfPages": ("number of pages", 100, 900, 50), "firstEditionYear": ("publication year", 1900, 2020, 10)},
        {"writtenBy": ("written by {}", PEOPLE), "inLanguage": ("in {}", LANGUAGES)},
    ),
    Entity(
        "LodgingBusiness",
        "hotel",
        "hotels",
        {"pricePerNight": ("price", 50, 400, 25), "numberOfRooms": ("number of rooms", 20, 200, 20)},
        {"addressLocality": ("in {}", CITIES), "amenityFeature": ("with a {}", ("pool", "gym", "garden", "sauna"))},
    ),
    Entity(
        "FoodEstablishment",
        "restaurant",
        "restaurants",
        {"ratingValue": ("rating", 1, 9, 1), "maxPartySize": ("number of seats", 10, 90, 10)},
        {
            "addressLocality": ("in {}", CITIES),
            "servesCuisine": ("serving {} food", ("Thai", "Greek", "Mexican", "Ethiopian", "Indian")),
        },
    ),
    Entity(
        "JobPosting",
        "job",
        "jobs",
        {"baseSalary": ("salary", 30000, 90000, 5000), "hoursPerWeek": ("weekly hours", 10, 40, 5)},
        {
            "hiringOrganization": ("at {}", ("Acme", "Globex", "Initech", "Umbra")),
            "addressLocality": ("in {}", CITIES),
        },
    ),
)

OPERATORS = (
    Operator("list", "{selection}", "find {many}"),
    Operator("first", "sort({p} asc of {selection})[1]", "find the first {one} by {phrase}"),
    Operator("last", "sort({p} desc of {selection})[1]", "find the last {one} by {phrase}"),
    Operator("first n", "sort({p} asc of {selection})[1:{n}]", "find the first {n} {many} by {phrase}"),
    Operator("last n", "sort({p} desc of {selection})[1:{n}]", "find the last {n} {many} by {phrase}"),
    Operator("count", "count(of {selection})", "how many {many} are there"),
    Operator("average", "avg({p} of {selection})", "what is the average {phrase} of {many}"),
    Operator("smallest", "min({p} of {selection})", "what is the lowest {phrase} among {many}"),
    Operator("largest", "max({p} of {selection})", "what is the highest {phrase} among {many}"),
    Operator("project", "[{p}] of {selection}", "show the {phrase} of {many}"),
    Operator(
        "project first",
        "[{q}] of sort({p} asc of {selection})[1]",
        "show the {q_phrase} of the first {one} by {phrase}",
    ),
)

# Kinds of conditions a selection can have; two conditions make long rows, so they are drawn less often.
SELECTIONS = ((), ("text",), ("number",), ("text", "number"))
WEIGHTS = (3, 3, 3, 1)

COMPARISONS = {"==": "of exactly", ">=": "of at least", "<=": "of at most"}


@dataclass(frozen=True)
class Row:
    """One example, and the pieces it is made of."""

    source: str
    reference: str
    operator: str
    entity: str
    selection: tuple[str, ...]
    properties: tuple[str, ...]

    @property
    def form(self) -> tuple[str, str]:
        """What is held out as a whole."""
        return self.operator, self.entity


def is_held_out(operator: int, entity: int) -> bool:
    """One (operator, entity) pair in five, spread so that each operator and each entity keeps most of its pairs."""
    return (3 * operator + entity) % 5 == 0


def _conditions(entity: Entity, selection: tuple[str, ...], rng: random.Random) -> list[tuple[str, str, str]]:
    """(property, as written in the expression, as said in the sentence) of each condition."""
    texts = rng.sample(sorted(entity.texts), selection.count("text"))
    numbers = rng.sample(sorted(entity.numbers), selection.count("number"))
    conditions = []
    for name in texts:
        pattern, values = entity.texts[name]
        value = rng.choice(values)
        conditions.append((name, f'{name} == "{value}"', pattern.format(value)))
    for name in numbers:
        phrase, low, high, step = entity.numbers[name]
        sign, value = rng.choice(sorted(COMPARISONS)), rng.randrange(low, high + 1, step)
        conditions.append((name, f"{name} {sign} {value}", f"with a {phrase} {COMPARISONS[sign]} {value}"))
    return conditions


def make_row(operator: Operator, entity: Entity, selection: tuple[str, ...], rng: random.Random) -> Row:
    """One row with random properties and values."""
    conditions = _conditions(entity, selection, rng)
    p, q = rng.sample(sorted(entity.numbers), 2)
    condition = " && ".join(written for _, written, _ in conditions)
    said = " and ".join(said for _, _, said in conditions)
    expression = operator.expression
    pieces = {
        "p": p,
        "q": q,
        "n": rng.randint(2, 9),
        "selection": f"{entity.name}()" + (f" filter {condition}" if condition else ""),
        "one": entity.one + (f" {said}" if said else ""),
        "many": entity.many + (f" {said}" if said else ""),
        "phrase": entity.numbers[p][0],
        "q_phrase": entity.numbers[q][0],
    }
    used = [name for key, name in (("{p}", p), ("{q}", q)) if key in expression] + [name for name, _, _ in conditions]
    return Row(
        expression.format(**pieces),
        operator.sentence.format(**pieces),
        operator.name,
        entity.name,
        selection,
        tuple(used),
    )


def make_splits(train: int = 1000, validation: int = 48, test: int = 48, seed: int = 0) -> dict[str, list[Row]]:
    """Distinct rows for "train", "validation" (both of the training forms) and "test" (of the held-out forms)."""
    rng = random.Random(seed)
    pairs = [(i, j) for i in range(len(OPERATORS)) for j in range(len(ENTITIES))]
    seen: set[str] = set()

    def draw(held_out: bool, count: int) -> list[Row]:
        choices = [pair for pair in pairs if is_held_out(*pair) == held_out]
        rows: list[Row] = []
        while len(rows) < count:
            i, j = rng.choice(choices)
            row = make_row(OPERATORS[i], ENTITIES[j], rng.choices(SELECTIONS, WEIGHTS)[0], rng)
            if row.source not in seen:
                seen.add(row.source)
                rows.append(row)
        return rows

    return {"train": draw(False, train), "validation": draw(False, validation), "test": draw(True, test)}


if __name__ == "__main__":
    for split, rows in make_splits(5, 5, 5).items():
        for row in rows:
            print(f"{split:10} {row.source}  →  {row.reference}")
