"""General English text, written for this program, on which `--forgetting builtin` measures perplexity.

Description, narrative, instruction, argument and dialogue, none of it about films, which the training data are about.
"""

_PAGES = """\
The harbour at Ellenby faces north-west, which is the wrong way for a harbour to face. When the gales come down the
coast in November the swell runs straight between the two piers, and boats that are tied up carelessly in the evening
are driftwood by the morning. Nobody knows who decided on the place. The oldest map in the town hall, drawn in 1742,
shows a row of huts, a chapel and a single jetty, and beside the jetty, in a neat brown hand, the words "not safe in
winter". The fishermen built there all the same, because the water was deep and the spring behind the chapel never ran
dry.

Today about four thousand people live in the town. Most of them work in the hospital, in the two schools, or in the
factory on the southern road, where pumps are made for mines and ships. Eleven boats still go out for crab and
lobster. The railway was closed in 1964; its line is now a path for walkers and cyclists, and it crosses the river on
an iron bridge of five arches that the council paints every seventh year in the same dark green.

Water boils at a lower temperature on a mountain than at the sea, because there is less air above it to press on its
surface. At a height of three thousand metres it boils at about ninety degrees Celsius. An egg that is done in four
minutes on the beach therefore takes longer in a hut near the summit, however large the flame is, and rice may stay
hard in the middle. A pot with a tight lid helps: steam that cannot escape raises the pressure, and with the pressure
the temperature rises too. Engineers use the same fact in the opposite direction when they dry milk or coffee under a
partial vacuum, where water leaves at a warmth that does no harm to the taste.

To repair a flat tyre you need two levers, a patch, some glue, sandpaper and a pump. First take the wheel out of the
frame and let out what air there is. Slide one lever under the edge of the tyre, press it down, and move the second
one along the rim until one side is free. Pull out the inner tube, pump it up a little and listen for the hiss; if you
hear nothing, hold the tube under water and look for bubbles. Mark the hole, dry the rubber and roughen it around the
mark. Spread the glue thinly, wait five minutes until it is no longer shiny, and press the patch on firmly. Before you
put the tube back, run your fingers along the inside of the tyre. The thorn or the piece of glass is very often still
there.

Martha had kept the letters in a biscuit tin for thirty years, and for thirty years she had not read them. On the day
when the roof began to leak she carried the tin down from the attic, put it on the kitchen table, and made a pot of
tea. "You could simply burn them," said her brother, who was standing at the window and watching the rain. "I could,"
she said. She lifted the lid. The paper had turned yellow at the edges, but the ink was as black as on the day when it
was used. The first letter began without a greeting. "I am writing this on the train," it said, "so you must forgive
the handwriting." She read it twice, slowly, then folded it along the old lines and laid it aside. "Well?" asked her
brother. "He was funnier than I remembered," said Martha, and reached for the next.

It is often said that a small country cannot afford to study the stars. The argument sounds sensible: a telescope
costs as much as a hospital wing, and nobody was ever cured by a photograph of a nebula. Yet the sum is not as simple
as that. The people who learn to measure a very faint light, to cool a detector, or to find one signal among a million
do not all remain astronomers. Some of them build scanners for the very hospital that was to have the money. Others
teach, and a child who has seen the rings of Saturn through a lens may ask better questions for the rest of her life.
None of this can be written into a budget in advance. That does not make it worthless; it only makes it hard to count.

The committee met on Tuesday, 14 March, at half past six. Present were Mr Okafor (chair), Mrs Lindqvist, Dr Rao and Ms
Bell; Mr Evans had sent his apologies. The minutes of the last meeting were approved without changes. Dr Rao reported
that the new pipe had been laid as far as the school and that the work had cost 18,250 pounds, which was 700 less than
had been expected. It was agreed to spend the difference on trees. Mrs Lindqvist asked whether the street lamps might
be switched off between one and five in the morning. After some discussion the question was put off until June, when
the figures for the neighbouring villages would be known. The meeting closed at ten to eight.
"""

GENERAL_TEXT = "\n\n".join(" ".join(paragraph.split()) for paragraph in _PAGES.split("\n\n"))
