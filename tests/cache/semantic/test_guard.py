"""What asks the same, and what does not, as far as words can tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_cache.semantic.guard import MOST_WORDS, Rule, refusal
from baton_cache.semantic.numbers import digits
from baton_cache.semantic.reading import read

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from semantic_pairs.pairs import all_pairs

SAME = [
    ("How do I reset my password?", "What are the steps to reset a password?"),
    ("What is the capital of France?", "France's capital?"),
    ("How can I turn on dark mode?", "Could you please tell me how to enable dark mode?"),
    ("How tall is Mount Everest?", "What's the height of Mount Everest?"),
    ("Why is the sky blue?", "What is the reason that the sky is blue?"),
    ("How do I boil twenty-five eggs?", "how to boil 25 eggs"),
    ("In Python, how do I sort a list?", "How can a list be sorted in Python?"),
    ("Who is the author of Hamlet?", "who is the writer of hamlet"),
    ("what is 5 km in miles", "what is 5km in miles"),
    ("How is honey made by bees?", "How do bees make honey?"),
    ("What is the difference between tea and coffee?", "How do coffee and tea differ?"),
    ("How do I fix `foo()`?", "What is the way to fix `foo()`?"),
    ("Can I freeze mushrooms?", "Is it possible to freeze mushrooms?"),
    ("How many bones does the human body have?", "How many bones are in the human body?"),
    ("Which symptoms does the flu have?", "What are the symptoms of the flu?"),
    ("How do I read a CSV file in R?", "How can I read a CSV file with R?"),
]
DIFFERENT = [
    ("What is 3 / 5?", "What is 3 - 5?", Rule.EXACT),
    ("What is -5 plus 2?", "What is 5 plus 2?", Rule.EXACT),
    ("Is v1.2 out?", "Is v1.3 out?", Rule.EXACT),
    ("meeting at 5:30", "meeting at 5:45", Rule.EXACT),
    ("weekday of 12/05/2024?", "weekday of 05/12/2024?", Rule.EXACT),
    ("Translate 'good night' to French", "Translate 'good day' to French", Rule.EXACT),
    ("how do I fix `foo()`", "how do I fix `bar()`", Rule.EXACT),
    ("rename `a` to `b`", "rename `b` to `a`", None),
    ("Who leads the US?", "Who leads us?", None),
    ("the first of May", "the second of May", Rule.EXACT),
    ("I need help with math", "I need no help with math", Rule.NEGATION),
    ("Who killed Hamlet?", "Who did Hamlet kill?", None),
    ("Who is the king?", "Who was the king?", Rule.TENSE),
    ("is it going to rain", "did it rain", Rule.TENSE),
    ("Why do I exist?", "Why do you exist?", Rule.PERSON),
    ("How can I help you?", "How can you help me?", Rule.PERSON),
    ("remove a from b", "remove b from a", None),
    ("Is a a part of b?", "Is b a part of a?", None),
    ("How do I add milk in tea?", "How do I add tea in milk?", None),
    ("How do I learn?", "Why do I learn?", Rule.KIND),
    ("What is the largest city?", "What are the largest cities?", Rule.COUNT),
    ("a b c" * 200, "a b c" * 200, Rule.LONG),
    ("什么是光合作用?", "什么是呼吸作用?", Rule.WORD),
    ("hi", "hello", Rule.EMPTY),
]


FOOLED_ONCE = """
Is he a doctor? | Has he a doctor?
Is japan an island? | Does japan have an island?
What does aspirin do? | What is aspirin?
What has four legs? | What is four legs?
Does gold have value? | Does gold do value?
Is john like tom? | Does john like tom?
Has the train left? | Does the train leave?
Have prices risen? | Do prices rise?
Is it raining in paris? | Does it rain in paris?
Are cats eaten? | Do cats eat?
Can a dog be eaten? | Can a dog eat?
Should children be taught? | Should children teach?
Was france defeated in 1940? | Did france defeat in 1940?
Is the dog going to be eaten? | Will the dog eat?
Who is paid? | Who pays?
Who was hired? | Who hired?
Who got fired? | Who fired?
How do I get hired at google? | How do I hire at google?
How do I get adopted? | How do I adopt?
Is the store closed? | Is the store closing?
Is my boss confused? | Is my boss confusing?
Are some mushrooms poisonous? | Are mushrooms poisonous?
Do any birds fly? | Do birds fly?
Can some birds swim? | Can birds swim?
What is a good golf score? | What is the best golf score?
Is python better? | Is python best?
Is coffee good for the heart? | Is coffee best for the heart?
What is a bad credit score? | What is the worst credit score?
What is wrong with me? | What is wrong with it?
Should I just eat fruit? | Should I eat fruit?
Is the steak well done? | Is the steak done?
Is vitamin a good for the skin? | Is vitamin good for the skin?
Is hepatitis a dangerous? | Is hepatitis dangerous?
What is plan a? | What is plan?
Who works with john? | Who works for john?
Who works at google? | Who works for google?
Who voted for trump? | Who voted with trump?
What is on the table? | What is in the table?
Can I cook with gas? | Can I cook for gas?
Will it arrive at 5? | Will it arrive within 5?
Is it due in 3 days? | Is it due within 3 days?
Is it possible to drive drunk? | Is it permitted to drive drunk?
Is it possible to drink seawater? | Is it okay to drink seawater?
What is the french word for us? | What is the french word for it?
Translate thank you to french | Translate please to french
How do you spell really? | How do you spell exactly?
What is 4² plus 5? | What is 42 plus 5?
What is CO₂? | What is CO2?
What is f' of x? | What is f of x?
Is !a true? | Is a true?
Who was the last us president? | Who was the latest us president?
What is the largest sea? | What is the largest ocean?
What is the weather in rome? | What is the climate in rome?
What is the longest road in the world? | What is the longest street in the world?
What is the highest mountain in the world? | What is the tallest mountain in the world?
How do I improve my blood pressure? | How do I increase my blood pressure?
How do I improve my cholesterol? | How do I raise my cholesterol?
Is there a cure for hiv? | Is there a treatment for hiv?
Can diabetes be cured? | Can diabetes be treated?
Is velocity a vector? | Is speed a vector?
Is an operating system software? | Is an operating system an application?
Is northern ireland part of great britain? | Is northern ireland part of the united kingdom?
Who produced titanic? | Who made titanic?
How do I charge a customer? | How do I recharge a customer?
How do I create a list in python? | How do I create an array in python?
Can I freeze champagne? | Can I chill champagne?
How do I file a claim? | How do I document a claim?
How do I delete a web page? | How do I delete a website?
Is the poorest country in africa? | Is the worst country in africa?
"""
"""Pairs that passed once, most of them closer together than the threshold."""


@pytest.mark.parametrize("pair", FOOLED_ONCE.strip().splitlines())
def test_what_fooled_it_once(pair: str) -> None:
    one, other = pair.split(" | ")
    assert refusal(one, other) is not None
    assert refusal(other, one) is not None


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_in_other_words(one: str, other: str) -> None:
    assert refusal(one, other) is None
    assert refusal(other, one) is None


@pytest.mark.parametrize(("one", "other", "rule"), DIFFERENT)
def test_something_else(one: str, other: str, rule: Rule | None) -> None:
    assert refusal(one, other) is not None
    assert (refusal(one, other) is None) == (refusal(other, one) is None)
    if rule is not None:
        assert refusal(one, other) is rule


def test_no_labelled_pair_of_different_questions_passes() -> None:
    wrong = [(pair.one, pair.other) for pair in all_pairs() if not pair.same and refusal(pair.one, pair.other) is None]
    assert wrong == []


def test_many_paraphrases_pass() -> None:
    same = [refusal(pair.one, pair.other) is None for pair in all_pairs() if pair.same]
    assert sum(same) > 0.5 * len(same)


WORDS = st.text(st.characters(codec="utf-8"), max_size=200)


@settings(deadline=None)
@given(WORDS)
def test_any_text_can_be_read_and_asks_what_it_asks(text: str) -> None:
    assert refusal(text, text) in (None, Rule.EMPTY, Rule.LONG)
    assert len(read("how do i " + text).items) <= 200


@settings(deadline=None)
@given(WORDS, WORDS)
def test_the_order_of_the_two_does_not_matter(one: str, other: str) -> None:
    assert (refusal(one, other) is None) == (refusal(other, one) is None)


@settings(deadline=None)
@given(st.integers(0, 999_999), st.integers(0, 999_999))
def test_other_numbers_never_pass(one: int, other: int) -> None:
    if one != other:
        assert refusal(f"How do I cook {one} eggs?", f"How do I cook {other} eggs?") is Rule.EXACT


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("twenty one", "21"),
        ("two hundred and five", "205"),
        ("three thousand four hundred", "3400"),
        ("1,000", "1000"),
        ("third", "#3"),
        ("3rd", "#3"),
        ("a dozen", "a 12"),
        ("1.0", "1.0"),
    ],
)
def test_numbers_in_words(said: str, number: str) -> None:
    assert " ".join(digits(said.split())) == number


def test_two_numbers_side_by_side_stay_two() -> None:
    assert list(digits(["one", "two"])) == ["1", "2"]
    assert list(digits(["two", "and", "three"])) == ["2", "and", "3"]


def test_private_characters_stand_for_themselves() -> None:
    assert refusal("what is \ue000", "what is \ue001") is not None
    assert refusal("what is \ue000", 'what is "x"') is not None


def test_the_longest_compared() -> None:
    words = " ".join(f"w{number}x" for number in range(MOST_WORDS))
    assert refusal(words, words) is None
    assert refusal(words + " more", words + " more") is Rule.LONG
