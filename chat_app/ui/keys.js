// The keys of the compare view: 1 first, 2 second, 0 tie, x both bad, s skip. Ignored while somebody types.
(() => {
  const buttons = {1: "pick-first", 2: "pick-second", 0: "pick-tie", x: "pick-both_bad", s: "pick-skip"};
  document.addEventListener("keydown", (event) => {
    const typing = /^(input|textarea|select)$/i.test(event.target.tagName) || event.target.isContentEditable;
    const isText = typing && !["radio", "checkbox", "button"].includes(event.target.type);
    if (isText || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const id = buttons[event.key.toLowerCase()];
    const button = id && document.getElementById(id);
    if (!button || button.disabled || button.offsetParent === null) return;
    event.preventDefault();
    button.click();
  });
})();
