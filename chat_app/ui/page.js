// What the chat and the rate page do in the browser: keys for a pair that has the focus, one press for a pair, the
// address of the conversation of this tab, and the text itself behind Copy and Edit (`shown_text.py`).
(() => {
  const PICKS = { 1: "pick-first", 2: "pick-second", 0: "pick-tie", x: "pick-both_bad", s: "pick-skip" };
  const APART_MS = 500; // nobody judges the next pair faster: a second press was meant for the one before
  const ANSWER_MS = 5000; // after this a press on the same pair is tried again; the server keeps one all the same
  const TYPED_MS = 1500;
  const SOURCE = /<!--zl ([A-Za-z0-9+/=]*)-->/g;

  const valueOf = (id) => document.querySelector(`#${id} textarea, #${id} input`)?.value;
  const takesText = (element) =>
    element?.isContentEditable ||
    /^(textarea|select)$/i.test(element?.tagName) ||
    (/^input$/i.test(element?.tagName) && !["radio", "checkbox", "button"].includes(element.type));

  // --- picks: the first press counts, keys only while the pair has the focus ---
  let pressed = { pair: "", at: -Infinity };
  let typedAt = -Infinity;

  document.addEventListener("keydown", (event) => {
    const box = document.getElementById("pair");
    if (!box?.contains(document.activeElement) || takesText(document.activeElement)) {
      typedAt = performance.now();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
    const id = Object.hasOwn(PICKS, event.key.toLowerCase()) && PICKS[event.key.toLowerCase()];
    const button = id && document.getElementById(id);
    if (!button || button.disabled || button.offsetParent === null) return;
    event.preventDefault();
    button.click();
  });

  document.addEventListener(
    "click",
    (event) => {
      if (!event.target.closest?.("#picks button")) return;
      const [pair, at] = [valueOf("pair-id") ?? "", performance.now()];
      const since = at - pressed.at;
      if (since < APART_MS || (pair === pressed.pair && since < ANSWER_MS)) {
        event.preventDefault();
        event.stopImmediatePropagation();
        return;
      }
      pressed = { pair, at };
    },
    true,
  );

  let seen = "";
  const watchPair = () => {
    const [pair, box] = [valueOf("pair-id") ?? "", document.getElementById("pair")];
    if (box && !box.hasAttribute("tabindex")) box.tabIndex = -1; // a click on an answer gives the pair the focus
    if (pair === seen || (pair && !box?.offsetParent)) return;
    seen = pair;
    const isFree = !takesText(document.activeElement) && performance.now() - typedAt > TYPED_MS;
    if (pair && isFree) box.focus({ preventScroll: true });
  };

  // --- the conversation of this tab: in its address, so that a reload shows it and no other tab does ---
  let conversation = "";
  const watchConversation = () => {
    const now = valueOf("conversation-id");
    if (now === undefined) {
      const chat = document.querySelector('.zl-nav a[href="/"]');
      const left = sessionStorage.getItem("zl-conversation");
      if (chat && left) chat.href = `/?c=${encodeURIComponent(left)}`; // from another page of this tab, back to it
    } else if (now !== conversation) {
      conversation = now;
      sessionStorage.setItem("zl-conversation", now);
      const address = new URL(location.href);
      if (now) address.searchParams.set("c", now);
      else address.searchParams.delete("c");
      history.replaceState(history.state, "", address);
    }
  };

  // --- Copy and Edit: the text as it was written, not the HTML that shows it ---
  const decoded = (base64) => new TextDecoder().decode(Uint8Array.from(atob(base64), (one) => one.charCodeAt(0)));
  const sourceOf = (text) => {
    const found = [...String(text).matchAll(SOURCE)].map((one) => decoded(one[1]));
    return found.length ? found.join("\n\n") : text;
  };
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(sourceOf(text));
  }
  document.addEventListener("copy", (event) => {
    const text = document.activeElement?.value ?? "";
    if (sourceOf(text) === text) return;
    event.clipboardData.setData("text/plain", sourceOf(text));
    event.preventDefault();
  });
  const watchEdits = () => {
    for (const field of document.querySelectorAll("#conversation textarea")) {
      const text = sourceOf(field.value);
      if (text === field.value) continue;
      field.value = text;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
  };
  document.addEventListener("click", () => requestAnimationFrame(() => requestAnimationFrame(watchEdits)), true);

  setInterval(() => [watchPair, watchConversation, watchEdits].forEach((watch) => watch()), 100);
})();
