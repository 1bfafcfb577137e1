"""`speak`: the phonemes of words, the likeliest and the best of a beam search, with what the dictionary has."""

import argparse
import math
from pathlib import Path

from g2p_tool.data import MAX_PHONEMES, check_word, phoneme_names, read_dictionary, spell
from g2p_tool.model import best_path, load_model


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", metavar="WORD", nargs="+", type=str.lower)
    parser.add_argument("--out", type=Path, default=Path("bench/out/g2p"), help="the training's folder")
    parser.add_argument("--beam", type=int, default=5, help="hypotheses of the beam search, default 5")
    parser.add_argument("--n-best", type=int, default=3, help="of these printed, default 3")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write attention heat maps to this image")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for words that the model cannot read and more n-best than the beam has."""
    for word in args.words:
        check_word(word)
    if not 1 <= args.n_best <= args.beam:
        raise ValueError(f"--n-best must be from 1 to --beam {args.beam}, got {args.n_best}")
    model, _ = load_model(best_path(args.out))
    dictionary = read_dictionary()
    source = spell(args.words)
    greedy = model.greedy(*source, max_len=MAX_PHONEMES)
    beam = model.beam(*source, beam=args.beam, n_best=args.n_best, max_len=MAX_PHONEMES)
    sentences, scores = beam.sentences(), beam.scores.T.tolist()
    for i, word in enumerate(args.words):
        right = " or ".join(" ".join(phonemes) for phonemes in dictionary.get(word, []))
        print(f"{word}   (dictionary: {right or 'not in it'})")
        print(f"  greedy        {' '.join(phoneme_names(greedy.sentences()[i][0]))}")
        for number, (tokens, score) in enumerate(zip(sentences[i], scores[i], strict=False), 1):
            print(f"  beam {number}  {math.exp(score):5.1%}  {' '.join(phoneme_names(tokens))}")
    if args.plot:
        from g2p_tool.attention import heat_maps  # here, so that speaking needs no matplotlib

        heat_maps(model, args.words).savefig(args.plot, dpi=120)
        print(f"attention drawn in {args.plot}")
    return 0
