/**
 * Prompts on which the difference shows. They are chosen: of the first 160 problems of the task
 * `word_problems` with seed 7, these are four of the 16 in which the pushed base model is wrong,
 * DMax is right in about as many forwards, and it revises tokens before their block is settled.
 * tests/serve/test_playground_examples.py decodes them.
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
      "Vera starts the week with 17 stamps. Then 2 more stamps arrive. Vera throws away 2 " +
      "broken stamps. A cousin takes 5 stamps home. Vera uses up 4 stamps for a project. Vera " +
      "sorts the stamps into 4 equal bags and keeps one bag. How many stamps does Vera end up " +
      "with?",
    answer: "2",
  },
  {
    name: "Tickets",
    prompt:
      "Tom starts the week with 8 tickets. The club tops it up to 2 times the number. Tom finds " +
      "2 more tickets in a drawer. A friend gives Tom 4 more tickets. An aunt sends Tom 3 " +
      "tickets by mail. Then 2 more tickets arrive. Then 3 of the tickets go missing. How many " +
      "tickets are there in the end?",
    answer: "24",
  },
  {
    name: "Tokens",
    prompt:
      "Henry has 14 tokens. A storm leaves just one of 2 equal shares. Henry throws away 5 " +
      "broken tokens. The club tops it up to 3 times the number. Henry finds 6 more tokens in a " +
      "drawer. Henry divides the pile by 3 and keeps a single part. A sponsor makes the " +
      "collection 4 times bigger. A dog runs off with 3 tokens. What is the final number of " +
      "tokens?",
    answer: "13",
  },
  {
    name: "Ribbons",
    prompt:
      "At the beginning Victor keeps 20 ribbons. The ribbons are dealt to 2 equal teams and " +
      "Victor keeps one part. A lucky draw multiplies the ribbons by 3. Victor uses up 4 " +
      "ribbons for a project. A dog runs off with 2 ribbons. Victor throws away 3 broken " +
      "ribbons. Later Victor collects 6 ribbons more. Victor buys 2 ribbons at the market. Find " +
      "how many ribbons Victor has at the end.",
    answer: "29",
  },
];

/**
 * The example that a prompt is; undefined for any other prompt.
 *
 * @param {string | {content: string}[] | null} prompt a text or the messages of a chat.
 * @returns {Example | undefined}
 */
export function exampleOf(prompt) {
  const text = Array.isArray(prompt) && prompt.length === 1 ? prompt[0]?.content : prompt;
  return EXAMPLES.find((example) => example.prompt === text);
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
