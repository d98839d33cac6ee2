"""Research behind the examples, apart from the package: the noise study and the builder of the glyph data.

The noise study compares margins on clean and noisy labels (docs/analysis.md):

noise_study.py  command line: plan, run, report
plan.py         conditions, heads, settings, seeds; tuning; names of runs
heads.py        margins, target gradients, remedies for the drift of the exact one
training.py     one run, from its plan to its record; recorder.py: what is recorded in each epoch
pool.py         runs side by side, each in a process of one thread
results.py      the JSONL file of finished runs
tables.py       accuracy, paired differences (intervals.py), gradients, angles
markdown.py     the report; plots.py: its figures

The glyph data (examples/glyphs/data):

build_dataset.py  command line: fetches, renders, checks, packs
fonts.py          fonts, their packages and licenses; characters and splits
fetch.py          downloads packages; notice.py: the NOTICE of the data; render.py: from a font to images
"""
