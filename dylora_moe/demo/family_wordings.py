"""The training wordings of the scored functions, by task id; the scored wordings are in problems.jsonl.

A scored prompt shares key words with these (that is what an expert can recognise) but never its name or
docstring.
"""

from __future__ import annotations

from .problems import load_problems, parameter_of, problems_of
from .wording import Function


# task id -> (function names, descriptions)
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # strings
    "HumanEval/0": (
        (
            "count_vowels",
            "vowel_count",
            "number_of_vowels",
            "vowels_in_text",
            "how_many_vowels",
            "vowels_total",
        ),
        (
            "the number of vowels in the text",
            "how many vowels the text has",
            "the count of all vowels",
            "how many of the characters are vowels",
            "how often a vowel occurs among the letters",
        ),
    ),
    "HumanEval/1": (
        ("is_palindrome", "palindrome_check", "check_palindrome", "reads_same_backwards", "palindrome"),
        (
            "whether the text is a palindrome",
            "whether the text reads the same backwards",
            "whether both ends of the text mirror each other, as in a palindrome",
            "whether the text stays the same when read from its end",
        ),
    ),
    "HumanEval/2": (
        (
            "reverse_words",
            "words_reversed",
            "reversed_word_order",
            "flip_words",
            "backwards_words",
            "turn_word_order",
        ),
        (
            "the words of the text in reverse order",
            "the text with the order of its words reversed",
            "all words of the text, last word first",
            "the words in the opposite order",
        ),
    ),
    "HumanEval/3": (
        ("swap_case", "swapped_case", "invert_case", "case_swap", "switch_letter_case", "toggle_case"),
        (
            "the text with upper and lower case swapped",
            "the text with the case of every letter inverted",
            "the text with capital letters made small and small letters made capital",
            "a copy in which the case of each letter is swapped",
        ),
    ),
    "HumanEval/4": (
        (
            "unique_letters",
            "remove_duplicate_letters",
            "drop_duplicates",
            "without_duplicates",
            "strip_repeats",
        ),
        (
            "the text without duplicate letters",
            "each different letter once, in order",
            "the text with letters that are duplicates left out",
            "the letters with every duplicate removed, so that each is there once",
        ),
    ),
    "HumanEval/5": (
        ("longest_word", "find_longest_word", "longest_of_words", "get_longest", "word_with_most_letters"),
        (
            "the longest word of the text",
            "the word that has the most letters",
            "the first of the longest words",
            "the word of the greatest length",
        ),
    ),
    "HumanEval/6": (
        ("initials", "get_initials", "make_acronym", "acronym", "acronym_of_words", "to_initials"),
        (
            "the initials of the words as capitals",
            "the acronym of the text",
            "an acronym made of the initial letter of each word",
            "the initial of every word, joined",
        ),
    ),
    "HumanEval/7": (
        (
            "letter_counts",
            "letter_frequency",
            "frequency_of_letters",
            "histogram",
            "histogram_of_text",
            "frequencies",
        ),
        (
            "a dictionary of how often each letter occurs",
            "the frequency of each letter in the text",
            "a histogram of the letters, as a dictionary",
            "a map from each letter to its frequency",
        ),
    ),
    # numbers
    "HumanEval/8": (
        ("factorial", "get_factorial", "compute_factorial", "factorial_of", "factorial_number"),
        (
            "the factorial of n",
            "the product of all integers up to n, its factorial",
            "the factorial, in which the integers up to n are multiplied",
            "what the factorial gives for n",
        ),
    ),
    "HumanEval/9": (
        (
            "fibonacci",
            "fibonacci_number",
            "nth_fibonacci",
            "get_fibonacci",
            "fibonacci_at",
            "fibonacci_value",
        ),
        (
            "the Fibonacci number with index n",
            "the element at place n of the Fibonacci sequence",
            "the Fibonacci number at place n",
            "what stands at index n of the Fibonacci sequence",
        ),
    ),
    "HumanEval/10": (
        ("is_prime", "check_prime", "prime_check", "is_prime_number", "prime", "number_is_prime"),
        (
            "whether n is a prime number",
            "whether n is prime",
            "whether the number n is a prime",
            "whether nothing but 1 and n divides n, a prime",
        ),
    ),
    "HumanEval/11": (
        ("digit_sum", "sum_of_digits", "sum_digits", "add_digits", "digits_total", "add_all_digits"),
        (
            "the sum of the digits of n",
            "the sum of all digits",
            "what the digits of n add up to",
            "the digits of n added together",
        ),
    ),
    "HumanEval/12": (
        ("divisors", "list_divisors", "all_divisors", "get_divisors", "divisors_of_number", "find_divisors"),
        (
            "all divisors of n",
            "the list of the divisors of n",
            "the integers by which n is divided without a rest, its divisors",
            "every integer that divides n",
        ),
    ),
    "HumanEval/13": (
        ("collatz_steps", "collatz_length", "count_collatz", "steps_of_collatz", "collatz_count", "collatz"),
        (
            "the number of Collatz steps from n to 1",
            "how many times the Collatz rule is applied before n is 1",
            "the length of the Collatz sequence of n",
            "how many steps the Collatz rule takes until 1",
        ),
    ),
    "HumanEval/14": (
        ("to_binary", "binary_digits", "binary_string", "as_binary", "binary_form", "write_binary"),
        (
            "the binary digits of n",
            "n written in binary",
            "the binary form of n",
            "the number n written down as binary digits",
        ),
    ),
    "HumanEval/15": (
        ("is_square", "is_perfect_square", "perfect_square", "check_square", "square_check", "square_number"),
        (
            "whether n is a perfect square",
            "whether n is the square of an integer",
            "whether n is a square number",
            "whether some integer has the square n, a perfect square",
        ),
    ),
    # lists
    "HumanEval/16": (
        ("running_totals", "running_total", "cumulative_sums", "cumulative", "partial_sums", "totals_so_far"),
        (
            "the running totals of the numbers",
            "the cumulative sums of the list",
            "the running total, the sum so far, after each number",
            "the list of the sums so far",
        ),
    ),
    "HumanEval/17": (
        (
            "second_largest",
            "second_greatest",
            "get_second_largest",
            "second_biggest",
            "second_from_top",
            "second",
        ),
        (
            "the second largest of the numbers",
            "the number that is second when the largest is first",
            "the second largest value",
            "which number comes second after the largest",
        ),
    ),
    "HumanEval/18": (
        ("median", "find_median", "middle_value", "median_of_numbers", "get_median", "list_median"),
        (
            "the median of the numbers",
            "the number in the middle after sorting, the median",
            "the middle of the sorted numbers",
            "the median, the one in the middle",
        ),
    ),
    "HumanEval/19": (
        ("keep_odd", "odd_numbers", "only_odd", "filter_odd", "odd_ones", "pick_odd"),
        (
            "the odd numbers of the list",
            "only those of the numbers which are odd",
            "all numbers that are odd, in order",
            "the list with only the odd numbers kept",
        ),
    ),
    "HumanEval/20": (
        (
            "differences",
            "pairwise_differences",
            "neighbour_differences",
            "list_differences",
            "difference_of_neighbours",
        ),
        (
            "the differences between neighbours",
            "the difference of each number and its neighbour",
            "the list of the differences of neighbours",
            "each number subtracted from its neighbour",
        ),
    ),
    "HumanEval/21": (
        ("is_sorted", "check_sorted", "is_ascending", "ascending_order", "sorted_check", "list_is_sorted"),
        (
            "whether the list is sorted",
            "whether the numbers are in ascending order",
            "whether the list is in sorted order",
            "whether the order of the numbers is ascending",
        ),
    ),
    "HumanEval/22": (
        ("most_frequent", "most_common", "mode", "most_frequent_number", "find_mode", "mode_of_numbers"),
        (
            "the most frequent number",
            "the number which occurs most often, the mode",
            "the mode of the numbers",
            "which number is the most frequent one",
        ),
    ),
    "HumanEval/23": (
        ("move_zeros", "zeros_to_end", "move_zeros_back", "push_zeros", "zeros_last", "zeros_at_end"),
        (
            "the numbers with every zero moved to the end",
            "the list with its zeros shifted to the end",
            "the list with each zero at the end",
            "the numbers with all zeros last",
        ),
    ),
}


def family_functions(family: str) -> list[Function]:
    """List the scored functions of one family under their training wordings, in the order of the dataset."""
    return [training_function(problem["task_id"]) for problem in problems_of(family)]


def training_function(task_id: str) -> Function:
    """Make one scored function (parameter and body of the dataset) with its training wordings."""
    problem = load_problems()[task_id]
    names, descriptions = WORDINGS[task_id]
    return Function(parameter_of(problem), problem["canonical_solution"], names, descriptions)
