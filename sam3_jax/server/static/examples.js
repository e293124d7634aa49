// Two images that sam3-tiny segments well, with phrases that find something in them.

import { $, h } from "./dom.js";

const EXAMPLES = [
  { file: "lion.jpg", title: "Lion, cat, hot dog", phrases: ["lion", "cat", "hot dog", "fire engine", "guitar"] },
  { file: "rabbit.jpg", title: "Rabbits, roses, books", phrases: ["rabbit", "rose", "blue book"] },
];

/** Lists the examples; open(file, phrases) gets the chosen one. */
export function attachExamples(open) {
  const choose = async ({ file, phrases }) => {
    const blob = await (await fetch(`/static/${file}`)).blob();
    await open(new File([blob], file, { type: blob.type }), phrases);
  };
  const items = EXAMPLES.map((example) =>
    h("li", {}, h("button", { type: "button", onClick: () => choose(example) },
      h("img", { src: `/static/${example.file}`, alt: "", width: 190, height: 142 }), h("span", { class: "small" }, example.title))),
  );
  $("#examples").replaceChildren(...items);
}
