import { readFragment } from "./api.js";

readFragment();
