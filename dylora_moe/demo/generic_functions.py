"""What the demo's foundation learns from: everyday Python functions, none of them a scored problem.

They share the surface form and the parameter names of the scored problems, so the foundation knows the
syntax.
"""

from __future__ import annotations

from textwrap import indent

from .wording import Function


def _function(parameter: str, body: str, names: str, *descriptions: str) -> Function:
    return Function(parameter, indent(body, "    ") + "\n", tuple(names.split()), descriptions)


GENERIC_FUNCTIONS: tuple[Function, ...] = (
    # text
    _function(
        "text",
        "return text.upper()",
        "to_upper shout make_upper",
        "the text in upper case",
        "the text shouted",
    ),
    _function(
        "text", "return text.lower()", "to_lower whisper", "the text in lower case", "the text whispered"
    ),
    _function(
        "text", "return text.title()", "to_title title", "the text as a title", "the text written as a title"
    ),
    _function(
        "text", "return text.strip()", "trim clean", "the text without space around", "the text trimmed"
    ),
    _function(
        "text", "return len(text)", "text_length size", "the length of the text", "how long the text is"
    ),
    _function(
        "text", "return len(text.split())", "word_count", "the number of words", "how many words there are"
    ),
    _function("text", "return text[:1]", "first_letter begin", "the first letter", "the letter at the start"),
    _function(
        "text", "return text[-1:]", "last_letter finish", "the last letter", "the letter at the very end"
    ),
    _function("text", "return text + text", "twice repeat", "the text twice", "the text repeated"),
    _function("text", "return not text", "is_empty", "whether the text is empty", "whether there is no text"),
    _function("text", "return list(text)", "letter_list", "the letters as a list", "a list of the letters"),
    _function("text", "return text.splitlines()", "lines", "the lines of the text", "the text line by line"),
    _function(
        "text", "return sorted(text.split())", "word_sort", "the words by alphabet", "the words, sorted"
    ),
    _function(
        "text",
        'return "".join(letter for letter in text if letter.isdigit())',
        "keep_digits only_digits",
        "the digits of the text",
        "the text with only its digits kept",
    ),
    _function(
        "text",
        'spaces = 0\nfor letter in text:\n    if letter == " ":\n        spaces += 1\nreturn spaces',
        "count_spaces blanks",
        "the number of spaces",
        "how many spaces there are",
    ),
    _function(
        "text",
        "lengths = {}\nfor word in text.split():\n    lengths[word] = len(word)\nreturn lengths",
        "word_lengths",
        "a dictionary of word lengths",
        "the length of each word",
    ),
    # n
    _function("n", "return n * 2", "double twice_number", "the double of n", "n times two"),
    _function(
        "n", "return n * n", "square_of to_square", "n times itself", "the area of a field with side n"
    ),
    _function("n", "return n * n * n", "cube cubed", "the cube of n", "the volume of a box with side n"),
    _function("n", "return n // 2", "half halve", "the half of n", "n halved"),
    _function(
        "n", "return n % 2 == 0", "is_even even", "whether n is even", "whether two halves of n are equal"
    ),
    _function("n", "return -n", "negate minus", "the negative of n", "n with the other sign"),
    _function("n", "return n + 1", "successor plus_one", "the successor of n", "one more than n"),
    _function("n", "return n - 1", "predecessor minus_one", "the predecessor of n", "one less than n"),
    _function("n", "return abs(n)", "absolute magnitude", "the absolute value of n", "n without its sign"),
    _function("n", "return len(str(n))", "digit_count", "the number of digits", "how many digits n has"),
    _function("n", "return list(range(n))", "count_up", "the numbers below n", "the list of numbers from 0"),
    _function(
        "n", "return n > 0", "is_positive positive", "whether n is positive", "whether n is above zero"
    ),
    _function(
        "n",
        "total = 0\nfor number in range(1, n + 1):\n    total += number\nreturn total",
        "sum_up_to triangle",
        "the triangle number of n",
        "the sum from 1 to n",
    ),
    _function(
        "n",
        "halves = 0\nwhile n > 1:\n    n = n // 2\n    halves += 1\nreturn halves",
        "halvings logarithm",
        "how often n is halved",
        "the logarithm of n",
    ),
    # numbers
    _function(
        "numbers", "return sum(numbers)", "total add_all", "the sum of the numbers", "all numbers added"
    ),
    _function("numbers", "return min(numbers)", "smallest minimum", "the smallest number", "the minimum"),
    _function("numbers", "return max(numbers)", "largest maximum", "the largest number", "the maximum"),
    _function(
        "numbers",
        "return len(numbers)",
        "list_length",
        "the length of the list",
        "how many numbers there are",
    ),
    _function(
        "numbers", "return numbers[0]", "first_number head", "the first number", "the head of the list"
    ),
    _function("numbers", "return numbers[-1]", "last_number tail", "the last number", "the tail of the list"),
    _function(
        "numbers", "return numbers[::-1]", "reversed_list", "the list reversed", "the numbers backwards"
    ),
    _function("numbers", "return sorted(numbers)", "sort_list", "the numbers sorted", "a sorted copy"),
    _function(
        "numbers",
        "return sum(numbers) / len(numbers)",
        "average mean",
        "the average",
        "the mean of the numbers",
    ),
    _function(
        "numbers",
        "return [number * number for number in numbers]",
        "squares",
        "the squares",
        "each number squared",
    ),
    _function(
        "numbers", "return [abs(number) for number in numbers]", "magnitudes", "the numbers without sign"
    ),
    _function(
        "numbers", "return any(number < 0 for number in numbers)", "any_negative", "whether one is negative"
    ),
    _function(
        "numbers",
        "return [number for number in numbers if number > 0]",
        "keep_positive",
        "the positive numbers",
        "only those above zero",
    ),
    _function(
        "numbers",
        "product = 1\nfor number in numbers:\n    product *= number\nreturn product",
        "product multiply_all",
        "the product of the numbers",
        "all numbers multiplied",
    ),
    _function(
        "numbers",
        "pairs = []\nfor first, second in zip(numbers, numbers[1:]):\n    pairs.append(first + second)\nreturn pairs",
        "pair_sums",
        "the sums of pairs",
        "each pair added",
    ),
)
