"""What a child knows, as questions with one answer: the closed questions of :mod:`colada.data.instructions`.

A category has eleven ways to ask, the last of which is kept for tests, and pairs of what is asked about and
the answer; where several answers are right, the first is the one that is taught.
"""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """Questions of one form.

    Attributes:
        wordings: with ``{}`` for what is asked about.
        answer: a sentence with ``{}`` for what is asked about and ``{answer}``.
        pairs: what is asked about, and the right answers.
    """

    wordings: tuple[str, ...]
    answer: str
    pairs: dict[str, tuple[str, ...]]


def _pairs(text: str) -> dict[str, tuple[str, ...]]:
    """Return pairs of a text: ``thing: answer/other answer, thing: answer``."""
    parts = (part.partition(":") for part in text.replace("\n", " ").split(","))
    return {thing.strip(): tuple(answers.strip().split("/")) for thing, _, answers in parts}


CATEGORIES: dict[str, Category] = {
    "colour": Category(
        (
            "What colour is {}?",
            "Which colour has {}?",
            "Tell me the colour of {}.",
            "Do you know what colour {} is?",
            "What is the colour of {}?",
            "{} has which colour?",
            "Of what colour is {}?",
            "Name the colour of {}.",
            "I wonder what colour {} has.",
            "Say which colour {} is.",
            "{}: what colour is it?",
        ),
        "It is {answer}.",
        _pairs(
            """grass: green, the sky: blue, the sun: yellow, snow: white, coal: black, a banana: yellow,
            a tomato: red, a lemon: yellow, a strawberry: red, milk: white, a frog: green, a carrot: orange,
            a cloud: white, the night: black/dark, a leaf: green, blood: red, chocolate: brown, a cherry: red,
            a pig: pink, a crow: black, a swan: white, the sea: blue, a pumpkin: orange, honey: yellow/golden,
            a fire engine: red, a polar bear: white, a flamingo: pink, a cucumber: green, an orange: orange,
            mud: brown, a chick: yellow, salt: white"""
        ),
    ),
    "sound": Category(
        (
            "What does {} say?",
            "What sound does {} make?",
            "Which noise does {} make?",
            "How does {} go?",
            "What noise comes from {}?",
            "{} says what?",
            "Say what {} says.",
            "Which sound do you hear from {}?",
            "Do you know what {} says?",
            "Tell me the sound of {}.",
            "Tell me what {} says.",
        ),
        "It says {answer}.",
        _pairs(
            """a cow: moo, a dog: woof, a cat: meow, a duck: quack, a sheep: baa, a pig: oink, a lion: roar,
            a bee: buzz, a snake: hiss, an owl: hoot, a frog: croak, a mouse: squeak, a horse: neigh,
            a bird: tweet, a rooster: cock-a-doodle-doo, a hen: cluck, a crow: caw, a wolf: howl,
            a train: choo, a clock: tick-tock, a bell: ding-dong, a donkey: hee-haw, a turkey: gobble,
            a dove: coo"""
        ),
    ),
    "legs": Category(
        (
            "How many legs has {}?",
            "How many legs does {} have?",
            "Count the legs of {}.",
            "{} walks on how many legs?",
            "{} has how many legs?",
            "Do you know how many legs {} has?",
            "What number of legs has {}?",
            "Say how many legs {} has.",
            "On how many legs does {} stand?",
            "I wonder how many legs {} has.",
            "Tell me how many legs {} has.",
        ),
        "It has {answer} legs.",
        _pairs(
            """a dog: four/4, a cat: four/4, a bird: two/2, a spider: eight/8, an ant: six/6, a horse: four/4,
            a hen: two/2, a cow: four/4, a bee: six/6, a fish: no/zero/0, a snake: no/zero/0, a frog: four/4,
            a table: four/4, a chair: four/4, a boy: two/2, a girl: two/2, a duck: two/2, a lion: four/4,
            an octopus: eight/8, a butterfly: six/6, a mouse: four/4, an owl: two/2, a worm: no/zero/0"""
        ),
    ),
    "young": Category(
        (
            "What is a young {} called?",
            "What do we call a baby {}?",
            "A baby {} is a what?",
            "What is the child of a {}?",
            "What is the name of a baby {}?",
            "Do you know what a young {} is called?",
            "Say what a baby {} is called.",
            "A young {} is called what?",
            "What do you call the child of a {}?",
            "Tell me what a little {} is called.",
            "Tell me the name of a young {}.",
        ),
        "It is a {answer}.",
        _pairs(
            """dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, hen: chick, duck: duckling,
            pig: piglet, bear: cub, lion: cub, goat: kid, frog: tadpole, deer: fawn, goose: gosling,
            swan: cygnet, kangaroo: joey, butterfly: caterpillar, wolf: cub/pup, seal: pup, owl: owlet"""
        ),
    ),
    "opposite": Category(
        (
            "What is the opposite of {}?",
            "Which word means the opposite of {}?",
            "Tell me the opposite of {}.",
            "Not {}, but what?",
            "Do you know the opposite of {}?",
            "Say the opposite of {}.",
            "The opposite of {} is what?",
            "Name the opposite of {}.",
            "What would be the opposite of {}?",
            "If it is not {}, what is it?",
            "{} and its opposite: what is it?",
        ),
        "It is {answer}.",
        _pairs(
            """big: small/little, hot: cold, up: down, happy: sad, fast: slow, day: night, good: bad,
            old: young/new, wet: dry, full: empty, open: closed/shut, hard: soft/easy, long: short, in: out,
            on: off, high: low, light: dark/heavy, clean: dirty, loud: quiet, left: right, first: last,
            black: white, early: late, rich: poor, strong: weak, near: far, yes: no, win: lose, push: pull,
            begin: end/finish, under: over, before: after, thick: thin, brave: afraid/scared, awake: asleep,
            laugh: cry, give: take, sweet: sour/bitter, tall: short, inside: outside"""
        ),
    ),
    "home": Category(
        (
            "Where does {} live?",
            "Where is the home of {}?",
            "What is the home of {}?",
            "In what place does {} live?",
            "{} lives where?",
            "Do you know where {} lives?",
            "Say where {} lives.",
            "In what does {} live?",
            "Where is {} at home?",
            "I wonder where {} lives.",
            "Tell me where {} lives.",
        ),
        "It lives in {answer}.",
        _pairs(
            """a fish: water/the water, a bird: a nest, a bee: a hive, a king: a castle, a spider: a web,
            a rabbit: a hole/a burrow, a dog: a kennel/a house, a horse: a stable, a pig: a sty,
            a cow: a barn, a bear: a cave/the forest, a whale: the sea/the ocean,
            an ant: the ground/an anthill,
            a lion: the jungle/a den, a frog: a pond, a hen: a coop, a camel: the desert,
            a penguin: the snow/the cold, a monkey: the trees/a tree, a squirrel: a tree"""
        ),
    ),
    "use": Category(
        (
            "What do you use to {}?",
            "With what do you {}?",
            "Which thing do you need to {}?",
            "What helps you to {}?",
            "What do people use to {}?",
            "Do you know what one needs to {}?",
            "Say what you use to {}.",
            "To {}, what do you use?",
            "What is there to {} with?",
            "I want to {}. What do I use?",
            "Tell me what one uses to {}.",
        ),
        "You use {answer}.",
        _pairs(
            """cut bread: a knife, eat soup: a spoon, write: a pen/a pencil, sweep the floor: a broom,
            dig a hole: a spade/a shovel, brush your teeth: a toothbrush, see: your eyes, hear: your ears,
            smell: your nose, walk: your legs/your feet, tell the time: a clock/a watch, open a lock: a key,
            stay dry in the rain: an umbrella, hit a nail: a hammer, sleep: a bed, sail: a boat,
            sew: a needle, cut paper: scissors, wash your hands: soap, drink tea: a cup,
            catch a fish: a net/a rod, light a dark room: a lamp, comb your hair: a comb, paint: a brush,
            climb a wall: a ladder"""
        ),
    ),
    "after": Category(
        (
            "What comes after {}?",
            "Which one is next after {}?",
            "{}, and then?",
            "What follows {}?",
            "Do you know what comes after {}?",
            "Say what comes after {}.",
            "After {}, what comes?",
            "What is next after {}?",
            "Name what follows {}.",
            "I wonder what comes after {}.",
            "Tell me what comes right after {}.",
        ),
        "After {} comes {answer}.",
        _pairs(
            """Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday,
            Saturday: Sunday, Sunday: Monday, January: February, February: March, March: April, April: May,
            May: June, June: July, July: August, August: September, September: October, October: November,
            November: December, December: January, spring: summer, summer: autumn/fall, autumn: winter,
            winter: spring, one: two/2, two: three/3, three: four/4, four: five/5, five: six/6, six: seven/7,
            seven: eight/8, eight: nine/9, nine: ten/10, ten: eleven/11, eleven: twelve/12, morning: noon,
            breakfast: lunch, lunch: dinner/supper"""
        ),
    ),
    "kind": Category(
        (
            "What is {}?",
            "What kind of thing is {}?",
            "{} is what?",
            "Tell me what {} is.",
            "Say what {} is.",
            "{}: what is it?",
            "What sort of thing is {}?",
            "I wonder what {} is.",
            "Name what {} is.",
            "What would you say {} is?",
            "Do you know what {} is?",
        ),
        "It is {answer}.",
        _pairs(
            """an apple: a fruit, a rose: a flower, an oak: a tree, a dog: an animal, a carrot: a vegetable,
            a hammer: a tool, red: a colour/a color, a chair: furniture/a piece of furniture, milk: a drink,
            a shirt: clothing/clothes, a car: a machine/a vehicle, seven: a number, Monday: a day,
            June: a month, a robin: a bird, a shark: a fish, a bee: an insect, a violin: an instrument,
            football: a game/a sport, a triangle: a shape, gold: a metal, a doll: a toy, bread: food,
            winter: a season, a tulip: a flower, a pear: a fruit, an ant: an insect, a circle: a shape,
            a drum: an instrument, a cabbage: a vegetable"""
        ),
    ),
    "made": Category(
        (
            "What is {} made of?",
            "From what is {} made?",
            "Which stuff is {} made of?",
            "Tell me what {} is made of.",
            "Do you know what {} is made of?",
            "Say what {} is made of.",
            "What do people make {} of?",
            "Name what {} is made of.",
            "Of what is {} made?",
            "I wonder what {} is made of.",
            "{} is made of what?",
        ),
        "It is made of {answer}.",
        _pairs(
            """a window: glass, a table: wood, a book: paper, a coin: metal, a snowman: snow, a jumper: wool,
            a shoe: leather, a wall: bricks/stone, butter: milk, bread: flour, wine: grapes, a candle: wax,
            a tyre: rubber, a sandcastle: sand, a cake: flour, ice: water, a statue: stone, cheese: milk,
            a kite: paper, a bottle: glass/plastic, a rope: string, a newspaper: paper, jam: fruit,
            a nest: twigs/sticks"""
        ),
    ),
}
