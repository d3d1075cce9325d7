// Elements of a page, made and found.

export const $ = (id) => document.getElementById(id);

// An element with properties (`dataset`, `aria-...` and `on...` among them) and children.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Hands bytes to the browser as a file.
export function save(bytes, media, name) {
  const link = make("a", { href: URL.createObjectURL(new Blob([bytes], { type: media })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Shows a dialog until it is closed; the promise holds what it was closed with.
export function ask(dialog) {
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
  });
}
