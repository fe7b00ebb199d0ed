/**
 * Prompts on which the difference shows. They are chosen: of 120 problems of `word_problems`, these
 * are among those that the base model solves, the pushed base does not, and DMax does.
 * tests/serve/test_playground_examples.py decodes them all.
 */

/**
 * @typedef {object} Example
 * @property {string} name
 * @property {string} prompt
 * @property {string} answer the number that a right completion ends with, after `####`.
 */

/** @type {Example[]} */
export const EXAMPLES = [
  {
    name: "Stamps",
    prompt:
      "Ivan has 10 stamps. Ivan wins 2 stamps in a game. Ivan trades an old hat for 6 stamps. " +
      "Ivan divides the pile by 2 and keeps a single part. A sister borrows 3 stamps and keeps " +
      "them. Ivan keeps trading until it is 3 times as much. A sister borrows 5 stamps and keeps " +
      "them. Find how many stamps Ivan has at the end.",
    answer: "13",
  },
  {
    name: "Tickets",
    prompt:
      "Tom starts the week with 8 tickets. The club tops it up to 2 times the number. Tom finds 2 " +
      "more tickets in a drawer. A friend gives Tom 4 more tickets. An aunt sends Tom 3 tickets " +
      "by mail. Then 2 more tickets arrive. Then 3 of the tickets go missing. How many tickets " +
      "are there in the end?",
    answer: "24",
  },
  {
    name: "Mugs",
    prompt:
      "At the beginning Bella keeps 4 mugs. Bella sorts the mugs into 2 equal bags and keeps one " +
      "bag. After a good deal Bella has 3 times as many. Bella packs 2 equal boxes and keeps only " +
      "one box. Bella buys 3 mugs at the market. Bella uses up 4 mugs for a project. How many " +
      "mugs are there in the end?",
    answer: "2",
  },
  {
    name: "Marbles",
    prompt:
      "A box that belongs to Jack holds 5 marbles. Jack picks up 3 marbles on the way home. A dog " +
      "runs off with 4 marbles. Jack receives 3 marbles as a present. Jack picks up 4 marbles on " +
      "the way home. A sister borrows 3 marbles and keeps them. How many marbles does Jack have " +
      "now?",
    answer: "8",
  },
];

/**
 * The example of this prompt; undefined for any other prompt.
 *
 * @param {string} prompt
 * @returns {Example | undefined}
 */
export function exampleOf(prompt) {
  return EXAMPLES.find((example) => example.prompt === prompt.trim());
}

/**
 * The number of the closing line `#### 13`, as `dmax.tasks` reads it; null without such a line.
 *
 * @param {string} text
 * @returns {string | null}
 */
export function closingNumber(text) {
  return text.match(/^#### (-?\d{1,18})\s*(?![^])/m)?.[1] ?? null;
}
